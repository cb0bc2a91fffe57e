"""Inputs of any layout with their fp64 twins, and losses compared in value and gradient."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

IMPL: Any = "torch"
"""triton in a process with TRITON_INTERPRET=1."""
EPS = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Leaf:
    """An input of some layout in memory, and its fp64 twin, which is contiguous."""

    def __init__(self, draw: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> None:
        how = draw(st.sampled_from(["plain", "plain", "transposed", "every second", "narrow", "expanded"]), name)
        base = (torch.randn(*shape[:-1], shape[-1] + 2) * scale).to(dtype)
        values = base[..., 1:-1] if how == "narrow" else base[..., 1:-1].contiguous()
        if how == "transposed" and len(shape) > 1:
            values = values.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif how == "every second":
            values = values.repeat_interleave(2, 0)[::2]
        elif how == "expanded" and shape[0]:
            values = values[:1].expand(shape)
        self.leaf = values.detach().requires_grad_()
        self.wide = values.detach().double().contiguous().requires_grad_()

    def __call__(self, wide: bool = False) -> Tensor:
        return self.wide if wide else self.leaf


def dtypes(draw: Any, label: str) -> torch.dtype:
    every = [torch.float32, torch.float16] + ([torch.bfloat16, torch.float64] if IMPL == "torch" else [])
    return draw(st.sampled_from(every), label=label)


def size(draw: Any, label: str, least: int = 0, most: int = 9) -> int:
    return draw(st.one_of(st.integers(least, most), st.sampled_from([16, 17, 33, 65])), label=label)


def compare(
    draw: Any,
    leaves: list[Leaf],
    ours: Callable[[], Tensor],
    truth: Callable[[], Tensor],
    scale: float,
    beside: Sequence[Leaf] = (),
    *,
    autocast: bool = True,
) -> None:
    """Value and gradients of `leaves`, the upstream gradient being drawn.

    Args:
        draw: of the case.
        leaves: what gets a gradient.
        ours: the loss.
        truth: the loss of the fp64 twins.
        scale: what errors of rounding are measured by.
        beside: what gets none.
        autocast: whether the loss is the same under autocast, and may be asked there.
    """
    upstream = draw(st.sampled_from([1.0, 3.0, -0.5, 0.0]), label="upstream")
    # The interpreter computes bf16 wrongly.
    within = autocast and IMPL == "torch" and draw(st.booleans(), label="autocast")
    with torch.autocast("cpu", torch.bfloat16, enabled=within):
        found = ours()
    expected = truth()
    exact = all(leaf.leaf.dtype == torch.float64 for leaf in [*leaves, *beside])
    tolerance = EPS[torch.float64 if exact else torch.float32]
    most = tolerance * (abs(expected.item()) + scale / 30)
    assert found.shape == ()
    assert torch.isfinite(found), f"{found.item()}, expected {expected.item()}"
    assert abs(found.item() - expected.item()) <= most, f"{found.item()}, expected {expected.item()}"
    if draw(st.booleans(), label="no_grad"):
        with torch.no_grad():
            assert abs(ours().item() - expected.item()) <= most, "another value under no_grad"
    assert found.requires_grad
    (found * upstream).backward()
    (expected * upstream).backward()
    assert all(leaf.leaf.grad is None for leaf in beside)
    for number, leaf in enumerate(leaves):
        if leaf.leaf.grad is None:
            assert leaf.wide.grad is None or not leaf.wide.grad.any(), f"no gradient for input {number}"
            continue
        mine, theirs = leaf.leaf.grad.double(), leaf.wide.grad
        theirs = torch.zeros_like(mine) if theirs is None else theirs
        assert mine.shape == theirs.shape
        bound = max(tolerance, EPS[leaf.leaf.dtype]) * (
            theirs.norm() + abs(upstream) * scale * 1e-2 * math.sqrt(mine.numel() + 1)
        )
        bound += 1e-7 * math.sqrt(mine.numel()) if leaf.leaf.dtype == torch.float16 else 0.0  # its smallest steps
        assert (mine - theirs).norm() <= bound, f"gradient of input {number}: off by {(mine - theirs).norm():.2e}"
