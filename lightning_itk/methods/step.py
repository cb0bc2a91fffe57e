"""What travels through a step: one forward pass of the models, and the named terms that are made of it."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_itk.batch import Batch, ResponseRows
from lightning_itk.models.hidden import HiddenStates


class Term(NamedTuple):
    """One named part of the loss (logged as train/NAME, val/NAME), or one named figure of an evaluation (val/NAME).

    Attributes:
        total: summed over its elements (tokens, query rows, …), not averaged; a scalar.
        weight: its factor in the loss; 0 = only logged, so no graph is needed. Of no effect in an evaluation.
        elements: what the log divides the total by; None = the batch's response tokens.
    """

    total: Float[Tensor, ""]
    weight: float = 1.0
    elements: Tensor | None = None


class TokenFigure(NamedTuple):
    """One number of each of n response tokens, and whose they are."""

    samples: Int[Tensor, " n"]  # record numbers, `Batch["sample_ids"]`
    values: Float[Tensor, " n"]


class ForwardPass(dict[str, Any]):
    """A batch and what the models made of it: made once in a step and handed on, never remembered.

    It has the keys of its batch, so whatever reads a batch reads a pass as well.
    """

    def __init__(self, batch: Batch, rows: ResponseRows, student: HiddenStates) -> None:
        super().__init__(batch)
        self.rows, self.student = rows, student


def on_a_pass(hook: Callable[[Any, Batch], Any]) -> Callable[[Any, Batch], Any]:
    """A hook whose batch is a pass, whoever calls it: all that it calls in turn shares that pass."""

    @wraps(hook)
    def wrapped(self: Any, batch: Batch) -> Any:
        return hook(self, cast(Batch, self.forward_pass(batch)))

    return wrapped


def weighted_sum(terms: dict[str, Term]) -> Float[Tensor, ""]:
    """What is differentiated: all terms times their weights.

    Raises:
        ValueError: something that is no Term, the name `loss` (that of the sum), or nothing that has a weight.
    """
    for name, term in terms.items():
        if not isinstance(term, Term) or name == "loss":
            found = "the name of their sum" if isinstance(term, Term) else type(term).__name__
            raise ValueError(f"losses must return Terms by name, found {name!r}: {found}")
    weighted = [term.weight * term.total for term in terms.values() if term.weight]
    if not weighted:
        raise ValueError("nothing to learn: no term of the loss has a weight")
    return torch.stack(weighted).sum()
