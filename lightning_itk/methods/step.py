"""What travels through a step: one forward pass of the models, and the named terms that are made of it."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, cast

from jaxtyping import Float
from torch import Tensor

from lightning_itk.batch import Batch, ResponseRows
from lightning_itk.models.hidden import HiddenStates


class Term(NamedTuple):
    """One named part of the loss, or one named figure of an evaluation."""

    total: Float[Tensor, ""]  # summed over its elements (tokens, query rows, …), not averaged
    weight: float = 1.0  # 0 = only logged
    elements: Tensor | None = None  # what the log divides the total by; None = the batch's response tokens


class ForwardPass(dict[str, Any]):
    """A batch and what the models made of it: made once in a step and handed on, never remembered.

    It has the keys of its batch, so whatever reads a batch reads a pass as well.
    """

    def __init__(self, batch: Batch, rows: ResponseRows, student: HiddenStates) -> None:
        super().__init__(batch)
        self.rows, self.student = rows, student


def on_a_pass(hook: Callable[[Any, Batch], dict[str, Term]]) -> Callable[[Any, Batch], dict[str, Term]]:
    """A hook whose batch is a pass, whoever calls it: all that it calls in turn shares that pass."""

    @wraps(hook)
    def wrapped(self: Any, batch: Batch) -> dict[str, Term]:
        return hook(self, cast(Batch, self.forward_pass(batch)))

    return wrapped
