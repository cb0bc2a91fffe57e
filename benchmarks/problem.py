"""What is to be computed: one shape of one subject, its fp64 answers, and whether others agree with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Loss = Callable[[Inputs], Tensor]
VALUE_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.02}
GRADIENT_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Relative errors from which an implementation counts as wrong and gets no number. Wide in half precision: how wrong it
is stands in every row, and `accuracy.py` shows what becomes of it as student and teacher get closer."""


@dataclass
class Problem:
    """One shape of one subject.

    Args:
        shape: what goes into the row.
        make: `(seed, small) -> inputs`; small = the same kind with fewer rows, for the fp64 reference.
        leaves: the inputs that get a gradient; the first one's rows are the problem's rows.
        reference: `(inputs, rows | None) -> summed loss` in plain torch, of these rows only.
        rows: how many rows the first leaf has, counted along the axis that `row_axis` names.
        kept: rows that count; the upstream gradient is 1 / kept, as a trainer's mean makes it.
        forward, both: fewest floating-point operations and fewest bytes, of a forward and of forward + backward.
        compiled: whether torch.compile is worth its minutes at this shape.
        yardstick: another operation of the same shape whose time the rows are divided by.
    """

    subject: str
    shape: dict[str, Any]
    dtype: torch.dtype
    make: Callable[[int, bool], Inputs]
    leaves: tuple[str, ...]
    reference: Callable[[Inputs, Tensor | None], Tensor]
    kept: int
    forward: tuple[float, float]
    both: tuple[float, float]
    row_axis: int = 0
    compiled: bool = False
    yardstick: Loss | None = None


Make = Callable[[Problem], Loss]
Makers = Mapping[str, Make]
"""How each provider is made in a subject, by its key."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def leaves_of(problem: Problem, inputs: Inputs) -> list[Tensor]:
    return [inputs[name].requires_grad_() for name in problem.leaves]


def widened(inputs: Inputs) -> Inputs:
    """The same numbers in fp64, detached."""
    return {
        name: value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


@dataclass
class Truth:
    """The fp64 answers to one problem: the whole of a small one, and some rows of the full one."""

    small: Inputs
    value: float
    gradients: list[Tensor]
    per_row: float  # the loss of a kept row, which says how far apart student and teacher are
    upstream: float
    full: Inputs | None = None
    rows: Tensor | None = None
    row_gradient: Tensor | None = None

    @classmethod
    def of(cls, problem: Problem) -> "Truth":
        small = problem.make(1, True)
        exact = widened(small)
        leaves = leaves_of(problem, exact)
        value = problem.reference(exact, None)
        kept = int(small.get("kept", problem.kept))
        gradients = torch.autograd.grad(value, leaves, torch.full_like(value, 1 / kept))
        return cls(small, value.item(), [g.detach() for g in gradients], value.item() / kept, 1 / kept)

    def add_rows(self, problem: Problem, full: Inputs) -> None:
        """A row's gradient depends on that row alone, so a few rows of the full size can be checked exactly."""
        count = full[problem.leaves[0]].shape[problem.row_axis]
        rows = torch.linspace(0, count - 1, 8).long().unique()
        exact = widened(full)
        leaf = exact[problem.leaves[0]].requires_grad_()
        value = problem.reference(exact, rows.to(leaf.device))
        (gradient,) = torch.autograd.grad(value, leaf, torch.full_like(value, 1 / problem.kept))
        self.full, self.rows = full, rows.to(leaf.device)
        self.row_gradient = gradient.index_select(problem.row_axis, self.rows)


def check(loss: Loss, problem: Problem, truth: Truth) -> dict[str, Any]:
    """Relative errors of the value and of the worst gradient, and of some rows at the full size."""
    leaves = leaves_of(problem, truth.small)
    value = loss(truth.small)
    gradients = torch.autograd.grad(value, leaves, torch.full_like(value, truth.upstream))
    errors = [relative_error(g, e) for g, e in zip(gradients, truth.gradients, strict=True)]
    found = {
        "value_error": abs(value.item() - truth.value) / abs(truth.value),
        "gradient_error": max(errors, key=lambda error: float("inf") if error != error else error),
        "kl": truth.per_row,
        "gradient_errors": dict(zip(problem.leaves, errors, strict=True)),
    }
    if truth.full is not None and truth.rows is not None and truth.row_gradient is not None:
        leaf = leaves_of(problem, truth.full)[0]
        value = loss(truth.full)
        (gradient,) = torch.autograd.grad(value, leaf, torch.full_like(value, 1 / problem.kept))
        found["gradient_error_full"] = relative_error(
            gradient.index_select(problem.row_axis, truth.rows), truth.row_gradient
        )
    return found


def wrong(errors: Mapping[str, Any], dtype: torch.dtype) -> str | None:
    """Why this implementation gets no number, or None."""
    limits = {"value_error": VALUE_LIMIT, "gradient_error": GRADIENT_LIMIT, "gradient_error_full": GRADIENT_LIMIT}
    for name, limit in limits.items():
        if name in errors and not errors[name] <= limit[dtype]:
            return f"{name} {errors[name]:.1e} is above {limit[dtype]:.0e}"
    return None
