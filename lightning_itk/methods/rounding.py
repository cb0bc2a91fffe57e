"""Weights in half precision that a learning rate cannot move."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def stuck_share(groups: Iterable[dict]) -> float:
    """The share of half-precision weights that an Adam step of full size (its learning rate) leaves as they are.

    A step below half the distance to the next number is rounded away. Waits for the device.

    Args:
        groups: an optimizer's; with a schedule `initial_lr` counts, the largest that is to come.

    Returns:
        0 where no weight is bf16 or fp16.
    """
    stuck = total = 0
    for group in groups:
        rate = float(group.get("initial_lr", group["lr"]))
        for parameter in group["params"]:
            weight: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if weight.dtype not in (torch.bfloat16, torch.float16):
                continue
            moved = (weight.float() - rate * torch.where(weight > 0, 1.0, -1.0)).to(weight.dtype)
            stuck += int((moved == weight).sum())
            total += weight.numel()
    return stuck / total if total else 0.0


def stuck_warning(groups: Iterable[dict]) -> str | None:
    """One line for a run that trains half-precision weights of which most cannot move; None where they can."""
    groups = list(groups)
    share = stuck_share(groups)
    if share <= 0.5:
        return None
    rate = max(float(group.get("initial_lr", group["lr"])) for group in groups)
    return (
        f"at learning rate {rate:g} an Adam step is rounded away in {share:.0%} of the half-precision weights: "
        "keep them in float32 (model.dtype: float32) and compute in half precision (trainer.precision: bf16-mixed)"
    )
