"""A position in the training data is the same for every way to cut a step into micro-batches and ranks."""

import itertools
from copy import deepcopy

import numpy as np
import pytest

from lightning_itk.data.sampler import BatchSampler
from lightning_itk.position import StepPlan, regroup

SHAPES = [(8, 1, 1), (2, 4, 1), (4, 1, 2), (1, 4, 2), (2, 1, 4), (1, 8, 1)]  # batch size, accumulation, ranks: 8 rows


@pytest.mark.parametrize("rows", [3, 8, 41, 48])
def test_a_position_keeps_its_rows(rows):
    lengths = np.random.default_rng(0).integers(2, 50, rows)
    seen = {}
    for size, accumulate, ranks in SHAPES:
        each = [
            BatchSampler(lengths, batch_size=size, accumulate=accumulate, rank=r, world=ranks) for r in range(ranks)
        ]
        cells = [list(sampler) for sampler in each]
        plan = each[0].step_plan
        assert plan.micro_batches == len(cells[0]) == len(each[0])
        for number in [*range(0, plan.micro_batches, accumulate), plan.micro_batches]:
            rest = {int(row[0]) for batches in cells for batch in batches[number:] for row in batch}
            seen[plan, number] = rest
    for (plan, number), (other, _) in itertools.product(seen, seen):
        assert seen[other, plan.translate(number, other)] == seen[plan, number], (plan, number, other)


def test_where_steps_differ_only_the_end_of_an_epoch_is_the_same():
    plan, other = StepPlan(41, 2, 4, 1), StepPlan(41, 2, 2, 1)
    assert plan.translate(0, other) == 0
    assert plan.translate(plan.micro_batches, other) == other.micro_batches == 21
    with pytest.raises(ValueError, match=r"same rows \(8 and 4\)"):
        plan.translate(8, other)
    with pytest.raises(ValueError, match="between two optimizer steps"):
        plan.translate(5, StepPlan(41, 8, 1, 1))
    assert plan.translate(5, plan) == 5


def checkpoint(epochs: int, at: int, completed: int) -> dict:
    plan = {"rows": 41, "batch_size": 2, "accumulate_grad_batches": 4, "ranks": 1}
    total = {"ready": epochs * 21 + at, "started": epochs * 21 + at, "completed": epochs * 21 + completed}
    current = {"ready": at, "started": at, "completed": completed}
    progress = {"total": total, "current": current, "is_last_batch": False}
    loader = {"epoch": epochs, "batches": at, "plan": plan}
    return {"loops": {"fit_loop": {"state_dict": {"combined_loader": [loader]}, "epoch_loop.batch_progress": progress}}}


def test_lightnings_counts_follow():
    loaded = checkpoint(epochs=2, at=8, completed=7)  # saved before Lightning counts the micro-batch as completed
    regroup(loaded, batch_size=4, accumulate=1, ranks=2)
    progress = loaded["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["current"] == {"ready": 2, "started": 2, "completed": 1}
    assert progress["total"] == {"ready": 14, "started": 14, "completed": 13}  # 6 micro-batches an epoch
    same = checkpoint(epochs=2, at=5, completed=5)
    before = deepcopy(same)
    regroup(same, batch_size=2, accumulate=4, ranks=1)
    assert same == before
    with pytest.raises(ValueError, match="same rows"):
        regroup(same, batch_size=2, accumulate=2, ranks=1)
