"""The load-balancing loss of a student that is a mixture of experts, exact over whole optimizer steps."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_itk.batch import Batch, sample_shares
from lightning_itk.losses.router import chosen_experts, router_balance
from lightning_itk.methods.step import ForwardPass, Term
from lightning_itk.models.hidden import RoutedStates, base_causal_lm, check_routers
from lightning_itk.models.precision import sum_dtype

_CHOSEN = "router/chosen"


class RouterLoss:
    """The term `router`: the mean over layers of experts * sum_e load_e p_e, summed over tokens.

    Load and probability are means over a whole step; their product is no sum over its micro-batches. But the load has
    no gradient. The load of the *previous* step is known beforehand, and with it the loss is a sum over tokens like
    any other: no micro-batch, accumulation, rank or padding changes the gradient. Samples of two steps are drawn apart,
    so their product estimates that of all data without the bias of a load and a probability of the same samples.
    In the first step all experts count alike: no gradient. What is learned a step late can swing: by plain gradient
    descent from half the learning rate or weight on that it would take without the delay.

    Args:
        student: a causal LM, in a wrapper or not.
        weight: of the term; None = the coefficient of the student's configuration where that has output_router_logits
            on, as transformers would train; 0 = off.

    Raises:
        ValueError: a weight that makes no sense, or a student without routers.
    """

    def __init__(self, student: torch.nn.Module, weight: float | None) -> None:
        config = base_causal_lm(student).config.get_text_config()
        if weight is None:
            asked = getattr(config, "output_router_logits", False)
            weight = float(getattr(config, "router_aux_loss_coef", 0.0)) if asked else 0.0
        if not 0 <= weight < float("inf"):
            raise ValueError(f"router_weight must be finite and not negative, got {weight}")
        self.weight = weight
        self._load: Float[Tensor, "layers experts"] | None = None
        if weight:
            check_routers(student)
            self._k: int = config.num_experts_per_tok

    def add_to(self, terms: dict[str, Term], batch: Batch) -> dict[str, Term]:
        """The terms of a batch, which is a `ForwardPass`, with this one."""
        if not self.weight:
            return terms
        if "router" in terms:
            raise ValueError("router: a term of losses has the name of the load-balancing loss; set router_weight: 0")
        logits, shares = self._seen(batch)
        uniform = torch.full_like(logits[0][0], self._k / logits[0].shape[-1])
        load = [uniform] * len(logits) if self._load is None else self._load.to(shares.device, non_blocking=True)
        losses = [router_balance(t, shares, by_expert) for t, by_expert in zip(logits, load, strict=True)]
        return {**terms, "router": Term(torch.stack(losses).mean(), self.weight)}

    def sums(self, batch: Batch) -> dict[str, Tensor]:
        """What the load of the step is made of."""
        if not self.weight:
            return {}
        logits, shares = self._seen(batch)
        return {_CHOSEN: torch.stack([chosen_experts(t, shares, self._k) for t in logits])}

    def end_step(self, sums: Mapping[str, Tensor]) -> None:
        """Keep the load of a step, from its sums over micro-batches and ranks, for the next one."""
        if _CHOSEN in sums:
            load = sums[_CHOSEN] / sums["targets"].clamp_min(1)
            old = torch.full_like(load, self._k / load.shape[-1]) if self._load is None else self._load
            self._load = torch.where(sums["targets"] > 0, load, old.to(load))

    def figures(self) -> dict[str, Tensor]:
        """For the log: how much more than its even part of the step's tokens the most used expert of a layer had."""
        if self._load is None:
            return {}
        most = self._load.max() * self._load.shape[-1] / self._k
        return {"train/router_max_load": most, "elements/router_max_load": torch.ones_like(most)}

    def state(self) -> list[list[float]] | None:
        """What a checkpoint keeps."""
        return None if self._load is None else self._load.tolist()

    def restore(self, state: list[list[float]] | None) -> None:
        self._load = None if state is None else torch.tensor(state, dtype=sum_dtype(torch.device("cpu")))

    @staticmethod
    def _seen(run: Batch) -> tuple[list[Tensor], Tensor]:
        """By layer the routers' logits [tokens, experts], and the tokens' shares."""
        assert isinstance(run, ForwardPass)
        if not isinstance(run.student, RoutedStates):
            raise ValueError("run_student returned states without router_logits: router_weight must be 0")
        shares = sample_shares(run.rows.host).flatten()
        return list(run.student.router_logits), shares.to(run.student.states.device, non_blocking=True)
