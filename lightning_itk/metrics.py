"""Metrics for instruction tuning, for torchmetrics where they are summed over batches and ranks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric


class TokenMean(Metric):
    """Sum of values over sum of counts: a mean that is right whatever the batches and the number of ranks.

    Args:
        dtype: of both sums.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, dtype: torch.dtype = torch.float64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor | int) -> None:
        """Add a sum over elements and how many there were."""
        self.total += torch.as_tensor(total).detach().to(self.total)
        self.count += torch.as_tensor(count).to(self.count)

    def compute(self) -> Tensor:
        return (self.total / self.count.clamp_min(1)).float()


class ResponsePerplexity(TokenMean):
    """exp of the mean negative log-likelihood of the response tokens."""

    def compute(self) -> Tensor:
        return (self.total / self.count.clamp_min(1)).exp().float()


class TeacherAgreement(TokenMean):
    """Share of response positions where student and teacher would say the same token."""

    def update(self, student_top1: Tensor, teacher_top1: Tensor) -> None:  # type: ignore[override]
        """Args: the likeliest tokens of both at the same positions, any equal shape."""
        super().update((student_top1 == teacher_top1).sum(), student_top1.numel())


class ExactMatch(TokenMean):
    """Share of answers that equal their reference once white space is normalised."""

    def update(self, answers: Sequence[str], references: Sequence[str]) -> None:  # type: ignore[override]
        if len(answers) != len(references):
            raise ValueError(f"{len(answers)} answers but {len(references)} references")
        hits = sum(same_words(a, r) for a, r in zip(answers, references, strict=True))
        super().update(torch.tensor(hits), len(answers))


class WinRate(TokenMean):
    """Share of comparisons won, a tie counting half: `update` takes scores of the same prompts."""

    def update(self, scores: Tensor, opponent: Tensor) -> None:  # type: ignore[override]
        """Args: scores [N] of this model and of the one it is compared with; higher is better."""
        if scores.shape != opponent.shape:
            raise ValueError(f"scores have shape {tuple(scores.shape)}, the opponent's {tuple(opponent.shape)}")
        wins = (scores > opponent).sum() + 0.5 * (scores == opponent).sum()
        super().update(wins, scores.numel())


def compatibility_adjusted_reward(reward: Any, loss: Any, beta: float = 3.0) -> Any:
    """CAR = reward / (1 + beta * loss).

    Args:
        reward: mean reward of a teacher's responses, at least 0: below, a higher loss would raise CAR (see
            `choice.shift_rewards`). A number, an array or a tensor.
        loss: mean response loss in nats per token under the student before any tuning, at least 0; of the same shape.
        beta: weight of the loss, at least 0; 0 = the plain reward. The paper tunes it and its value is not known; 3 is
            this kit's default.

    Returns:
        CAR, as a number, array or tensor like `reward`.

    Raises:
        ValueError: a negative or undefined reward, loss or beta.

    Source: arXiv 2411.07133, CAR(D, theta) = r(D) / (1 + beta L(D, theta)).
    """
    if not 0 <= beta < np.inf:
        raise ValueError(f"beta must be a number of at least 0, found {beta}")
    rewards, losses = finite_array("reward", reward), finite_array("loss", loss)
    if losses.size and losses.min() < 0:
        raise ValueError(f"losses must be at least 0, found {losses.min():g}")
    if rewards.size and rewards.min() < 0:
        raise ValueError(f"rewards must be at least 0, found {rewards.min():g}: shift them first, all teachers alike")
    if rewards.shape != losses.shape and rewards.ndim and losses.ndim:
        raise ValueError(f"rewards and losses must have one shape, found {rewards.shape} and {losses.shape}")
    if isinstance(reward, Tensor) or isinstance(loss, Tensor):
        return reward / (1 + beta * loss)
    car = rewards / (1 + beta * losses)
    return car if car.ndim else float(car)


class CompatibilityAdjustedReward(Metric):
    """CAR of one teacher's responses: mean reward / (1 + beta * mean response loss), over all batches and ranks.

    Args:
        beta: weight of the loss, see `compatibility_adjusted_reward`.
        **kwargs: of `torchmetrics.Metric`.

    Source: arXiv 2411.07133.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    reward: Tensor
    loss: Tensor
    samples: Tensor

    def __init__(self, beta: float = 3.0, **kwargs: object) -> None:
        super().__init__(**kwargs)
        compatibility_adjusted_reward(0.0, 0.0, beta)  # refuses a beta below 0
        self.beta = beta
        for name in ("reward", "loss", "samples"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, reward: Tensor, loss: Tensor) -> None:
        """Add samples.

        Args:
            reward: reward of each response [samples].
            loss: mean response NLL of each under the untuned student, nats [samples].
        """
        if reward.shape != loss.shape:
            raise ValueError(f"one reward and one loss per sample, found {tuple(reward.shape)} and {tuple(loss.shape)}")
        self.reward += reward.double().sum()
        self.loss += loss.double().sum()
        self.samples += reward.numel()

    def compute(self) -> Tensor:
        """CAR of all samples so far; refused where their mean reward is negative, nan where there are none."""
        if self.samples == 0:
            return torch.full_like(self.reward, torch.nan)
        car: Tensor = compatibility_adjusted_reward(self.reward / self.samples, self.loss / self.samples, self.beta)
        return car


def same_words(a: str, b: str) -> bool:
    """Whether two texts are equal once white space is normalised."""
    return a.split() == b.split()


def finite_array(what: str, values: Any) -> NDArray[np.float64]:
    """Numbers, arrays or tensors as float64; refused by the name `what` where one is nan or infinite."""
    array = np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{what} must be finite, found {array[~np.isfinite(array)].flat[0]}")
    return array
