"""Which samples meet in which optimizer step, and how a step is dealt to ranks and micro-batches.

The samples of an optimizer step depend on (seed, epoch, step) and on the number of rows per step only. Eight rows per
step are the same eight, whether they come as one batch of 8, four of 2 that are accumulated, or two ranks with 4 each.
A row is one sample, or one pack of samples.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lightning_itk.data.order import longest_first, numbers
from lightning_itk.data.packing import best_fit
from lightning_itk.data.rows import Rows
from lightning_itk.position import StepPlan

# Rows are sorted by length in pools of at most this many steps, and there are at least so many pools: fewer for few
# samples, whose pools would hold too little to sort, but no fewer than that, or every batch holds one length only. That
# costs learning where length goes with the kind of question.
_POOL_STEPS = 64
_LEAST_POOLS, _MOST_LEAST_POOLS, _POOL_SAMPLES = 3, 8, 160
_GROUPS_VERSION = 2  # of those above and `_grouped_by_length`: a plan is made anew when an epoch is resumed


class MixedSource(NamedTuple):
    """Samples that share a weight."""

    samples: np.ndarray
    weight: float = 1.0


class BatchSampler:
    """Batches of one rank, as lists of rows (arrays of sample numbers); the same number of them on every rank.

    Over all ranks every sample comes exactly once per epoch (weights aside). Where a step has fewer rows than ranks,
    the ranks left over get an empty list, never a duplicate.

    Shuffled rows of similar length meet in a step, so that padding is small; the order of the steps is random. Without
    shuffling, the order of the samples is kept.

    Args:
        lengths: tokens of every sample.
        batch_size: rows of a micro-batch.
        accumulate: micro-batches of an optimizer step on one rank.
        rank: this rank.
        world: number of ranks.
        shuffle: a new random order every epoch.
        pack_to: pack samples into rows of this many tokens; None = one sample per row.
        longest_first: sort by length, for evaluation: little padding, and memory runs out at once or never.
        seed: of the order.
        sources: samples and their weights; None = all samples, weight 1. A weight of w gives round(w * n) samples per
            epoch: whole repeats, and for the fraction a fresh random choice every epoch.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        pack_to: int | None = None,
        longest_first: bool = False,
        seed: int = 0,
        sources: Sequence[MixedSource] | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size, self.accumulate, self.rank, self.world = batch_size, accumulate, rank, world
        self.shuffle, self.pack_to, self.longest_first, self.seed = shuffle, pack_to, longest_first, seed
        self.sources = list(sources) if sources is not None else [MixedSource(numbers(len(self.lengths)))]
        self.epoch = 0
        self._rows: tuple[int, Rows] | None = None
        self._tokens: int | None = None
        # Lightning asks for the length once. Packs of a sample that changes every epoch may differ in number, so the
        # number of the first epoch holds for all.
        self._count = len(self._plan(0)) if pack_to is not None else sum(map(_size, self.sources))
        self.step_plan = StepPlan(self._count, batch_size, accumulate, world)

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before every epoch."""
        self.epoch = epoch

    def signature(self) -> dict[str, int | bool | None]:
        """What must not change between a checkpoint in the middle of an epoch and its resumption."""
        if self._tokens is None:
            self._tokens = int(self.lengths.sum(dtype=np.int64))
        return {
            "batch_size": self.batch_size,
            "accumulate_grad_batches": self.accumulate,
            "ranks": self.world,
            "shuffle": self.shuffle,
            "packed to": self.pack_to,
            "seed": self.seed,
            "rows": self._count,
            "tokens": self._tokens,
            "version of the length groups": _GROUPS_VERSION if self.shuffle and self.pack_to is None else None,
        }

    def __len__(self) -> int:
        """Micro-batches per epoch on each rank."""
        return self.step_plan.micro_batches

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[list[np.ndarray]]:
        """The epoch's batches from number `start` on."""
        rows = self._plan(self.epoch).split_to(self._count)
        for step in range(start // self.accumulate, self.step_plan.steps):
            last = step == self.step_plan.steps - 1
            size = self.step_plan.rows_per_step
            members = np.arange(step * size, len(rows) if last else (step + 1) * size)
            if self.shuffle and self.pack_to is None:
                # Neighbours in length become a micro-batch, and ranks get similar lengths at the same time.
                members = members[np.argsort(-self.lengths[rows.samples[rows.places(members)]], kind="stable")]
            micro_batches = self.step_plan.last_micro_batches if last else self.accumulate
            cells = np.array_split(members, micro_batches * self.world)
            for micro_batch in range(micro_batches):
                if step * self.accumulate + micro_batch >= start:
                    yield [rows[row] for row in cells[micro_batch * self.world + self.rank]]

    def _plan(self, epoch: int) -> Rows:
        if self._rows is None or self._rows[0] != epoch:
            self._rows = None  # two plans at once would take twice the memory
            self._rows = (epoch, self._make_plan(epoch))
        return self._rows[1]

    def _make_plan(self, epoch: int) -> Rows:
        rng = np.random.default_rng([self.seed, epoch])
        if self.pack_to is not None:
            samples, bounds = best_fit(self.lengths, self.pack_to, self._samples(rng))
            return Rows(samples, bounds, _permutation(len(bounds) - 1, rng) if self.shuffle else None)
        samples = self._samples(rng)
        if not self.shuffle:
            return Rows(samples)
        step = self.batch_size * self.accumulate * self.world
        _group_by_length(samples, self.lengths, step)
        return Rows(samples, None, _permutation(len(samples) // step, rng), step)

    def _samples(self, rng: np.random.Generator) -> np.ndarray:
        """All samples of an epoch, as often as they come in it, in the order in which they are made into rows."""
        kind = np.result_type(numbers(0), *(source.samples for source in self.sources))
        samples = np.empty(sum(map(_size, self.sources)), kind)
        end = 0
        for source in self.sources:
            repeats, rest = divmod(_size(source), len(source.samples)) if len(source.samples) else (0, 0)
            for _ in range(repeats):
                samples[end : end + len(source.samples)] = source.samples
                end += len(source.samples)
            samples[end : end + rest] = rng.choice(source.samples, rest, replace=False)
            end += rest
        if self.shuffle:
            rng.shuffle(samples)
        else:
            samples.sort()
        return longest_first(samples, self.lengths) if self.longest_first else samples


def _size(source: MixedSource) -> int:
    """round(weight * n): whole repeats and a random choice for the rest."""
    return round(source.weight * len(source.samples))


def _permutation(count: int, rng: np.random.Generator) -> np.ndarray:
    """What rng.permutation(count) gives, in as few bytes as that takes."""
    order = numbers(count)
    rng.shuffle(order)
    return order


def _group_by_length(samples: np.ndarray, lengths: np.ndarray, step: int) -> None:
    """Sort shuffled samples by length within pools of many steps; their full steps are then taken in random order."""
    full = len(samples) // step
    least = int(np.clip(len(samples) // _POOL_SAMPLES, _LEAST_POOLS, _MOST_LEAST_POOLS))
    pools = max(1, min(full, max(least, -(-full // _POOL_STEPS))))
    # A pool begins with a full step; the rest goes with the last one.
    starts = [-(-pool * full // pools) * step for pool in range(pools)]
    for start, end in pairwise([*starts, len(samples)]):  # pool by pool: no copies of all, and faster than all at once
        pool = samples[start:end]
        pool[:] = pool[np.argsort(-lengths[pool], kind="stable")]
