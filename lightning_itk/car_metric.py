"""The compatibility-adjusted reward as a torchmetrics metric, for use inside a module's loop."""

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_itk.choice import compatibility_adjusted_reward


class CompatibilityAdjustedReward(Metric):
    """CAR of one teacher's responses: mean reward / (1 + beta * mean response loss), over all batches and ranks.

    Args:
        beta: weight of the loss, see `choice.compatibility_adjusted_reward`.
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
