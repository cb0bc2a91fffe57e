"""Where training stands in its data: in micro-batches of one rank, as Lightning counts, and in optimizer steps, which
mean the same on any number of ranks."""

from typing import Any, NamedTuple


class StepPlan(NamedTuple):
    """How the rows of an epoch are cut into optimizer steps, and a step into the micro-batches of every rank.

    Only the last step of an epoch may have fewer rows, and then fewer micro-batches.
    """

    rows: int
    batch_size: int  # rows of a micro-batch
    accumulate: int  # micro-batches of a step on one rank
    ranks: int

    @classmethod
    def of(cls, signature: dict[str, Any]) -> "StepPlan":
        """The plan that a `BatchSampler` noted in a checkpoint."""
        return cls(*(signature[name] for name in ("rows", "batch_size", "accumulate_grad_batches", "ranks")))

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulate * self.ranks

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.rows // self.rows_per_step)

    @property
    def last_micro_batches(self) -> int:
        """Micro-batches of the epoch's last step."""
        if not self.steps:  # so few samples at such a low weight that none is drawn
            return 0
        left = self.rows - (self.steps - 1) * self.rows_per_step
        return -(-left // (self.batch_size * self.ranks))

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an epoch on each rank."""
        return max(self.steps - 1, 0) * self.accumulate + self.last_micro_batches

    def translate(self, micro_batches: int, plan: "StepPlan") -> int:
        """A number of micro-batches of this plan, as the number after which `plan` has seen the same rows.

        Raises:
            ValueError: within an epoch, where the steps of the two differ in their rows or have not ended.
        """
        if self == plan or micro_batches == 0:
            return micro_batches
        if micro_batches == self.micro_batches:
            return plan.micro_batches
        if self.rows_per_step != plan.rows_per_step:
            raise ValueError(
                f"the checkpoint stands in the middle of an epoch with {self} and this run has {plan}: both steps must "
                f"have the same rows ({self.rows_per_step} and {plan.rows_per_step}); the end of an epoch suits any run"
            )
        if micro_batches % self.accumulate:
            raise ValueError("the checkpoint stands between two optimizer steps: resume it with the settings it had")
        return micro_batches // self.accumulate * plan.accumulate

    def __str__(self) -> str:
        return f"batch_size {self.batch_size} x accumulate_grad_batches {self.accumulate} x ranks {self.ranks}"


def rewind(checkpoint: dict[str, Any], micro_batches: int) -> None:
    """Let a checkpoint stand at the beginning of its accumulation window, where its weights are: nobody keeps the
    gradients that the window has gathered so far, so its micro-batches are run again.

    Args:
        checkpoint: as Lightning is about to write it; its counts of batches and the positions in the data are changed.
        micro_batches: how many the window has had.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        counts |= dict.fromkeys(("ready", "started", "processed", "completed"), counts["ready"] - micro_batches)
    progress["is_last_batch"] = False
    for position in _positions(checkpoint):
        position["batches"] -= micro_batches


def regroup(checkpoint: dict[str, Any], *, batch_size: int, accumulate: int, ranks: int) -> None:
    """Count the batches of a checkpoint as a run does that cuts the same steps into other micro-batches, or for
    another number of ranks. The loader translates its own position.

    Args:
        checkpoint: as it was read; its counts of batches are changed.
        batch_size, accumulate, ranks: of this run.

    Raises:
        ValueError: this run's steps have other rows, and the checkpoint stands in the middle of an epoch.
    """
    plan = next((position["plan"] for position in _positions(checkpoint) if "plan" in position), None)
    if plan is None:
        return
    then = StepPlan.of(plan)
    now = StepPlan(then.rows, batch_size, accumulate, ranks)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    total, current = progress["total"], progress["current"]
    at = current["ready"]
    moved = then.translate(at, now)
    epochs = (total["ready"] - at) // max(then.micro_batches, 1)
    for counts, count in ((current, moved), (total, moved + epochs * now.micro_batches)):
        counts |= {name: value - counts["ready"] + count for name, value in counts.items()}


def _positions(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """The positions in the training data that a checkpoint holds: of Lightning's loops, and of data modules."""
    loaders = list(checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", []))
    data = [state["train"] for state in checkpoint.values() if isinstance(state, dict) and "train" in state]
    found = {id(state): state for state in [*loaders, *data]}.values()  # often one object under two names
    return [state for state in found if isinstance(state, dict) and "batches" in state]
