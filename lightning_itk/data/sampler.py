"""Which samples meet in which optimizer step, and how a step is dealt to ranks and micro-batches.

The samples of an optimizer step depend on (seed, epoch, step) and on the number of rows per step only. Eight rows per
step are the same eight, whether they come as one batch of 8, four of 2 that are accumulated, or two ranks with 4 each.
A row is one sample, or one pack of samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lightning_itk.data.packing import best_fit
from lightning_itk.position import StepPlan

# Rows are sorted by length in pools of at most this many steps, and there are at least so many pools: fewer for few
# samples, whose pools would hold too little to sort, but no fewer than that, or every batch holds one length only. That
# costs learning where length goes with the kind of question.
_POOL_STEPS = 64
_LEAST_POOLS, _MOST_LEAST_POOLS, _POOL_SAMPLES = 3, 8, 160
_GROUPS_VERSION = 2  # of those above and `_grouped_by_length`: a plan is made anew when an epoch is resumed


@dataclass(frozen=True)
class Rows:
    """Rows of an epoch in the order in which they are trained on."""

    samples: np.ndarray  # sample numbers, row after row
    bounds: np.ndarray  # where each row starts in `samples`, and the end [rows + 1]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.samples[self.bounds[row] : self.bounds[row + 1]]

    def take(self, order: np.ndarray) -> "Rows":
        """These rows in another order."""
        sizes = np.diff(self.bounds)[order]
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        shift = np.repeat(self.bounds[order] - bounds[:-1], sizes)
        return Rows(self.samples[np.arange(bounds[-1]) + shift], bounds)

    def split_to(self, count: int) -> "Rows":
        """At least `count` rows, as far as there are samples: packs give their last sample a row of its own."""
        bounds = self.bounds
        while len(bounds) - 1 < count and len(splittable := np.flatnonzero(np.diff(bounds) > 1)):
            bounds = np.union1d(bounds, bounds[splittable[: count - len(bounds) + 1] + 1] - 1)
        return Rows(self.samples, bounds)


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
        self.sources = list(sources) if sources is not None else [MixedSource(_numbers(len(self.lengths)))]
        self.epoch = 0
        self._rows: tuple[int, Rows] | None = None
        # Lightning asks for the length once. Packs of a sample that changes every epoch may differ in number, so the
        # number of the first epoch holds for all.
        self._count = len(self._plan(0)) if pack_to is not None else sum(map(_size, self.sources))
        self.step_plan = StepPlan(self._count, batch_size, accumulate, world)

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before every epoch."""
        self.epoch = epoch

    def signature(self) -> dict[str, int | bool | None]:
        """What must not change between a checkpoint in the middle of an epoch and its resumption."""
        return {
            "batch_size": self.batch_size,
            "accumulate_grad_batches": self.accumulate,
            "ranks": self.world,
            "shuffle": self.shuffle,
            "packed to": self.pack_to,
            "seed": self.seed,
            "rows": self._count,
            "tokens": int(self.lengths.sum()),
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
                members = members[np.argsort(-self.lengths[rows.samples[members]], kind="stable")]
            micro_batches = self.step_plan.last_micro_batches if last else self.accumulate
            cells = np.array_split(members, micro_batches * self.world)
            for micro_batch in range(micro_batches):
                if step * self.accumulate + micro_batch >= start:
                    yield [rows[row] for row in cells[micro_batch * self.world + self.rank]]

    def _plan(self, epoch: int) -> Rows:
        if self._rows is None or self._rows[0] != epoch:
            self._rows = (epoch, self._make_plan(epoch))
        return self._rows[1]

    def _make_plan(self, epoch: int) -> Rows:
        rng = np.random.default_rng([self.seed, epoch])
        samples = np.concatenate([_numbers(0), *(_drawn(source, rng) for source in self.sources)])
        if self.shuffle:
            rng.shuffle(samples)
        else:
            samples.sort()
        if self.longest_first:
            samples = samples[np.argsort(-self.lengths[samples], kind="stable")]
        if self.pack_to is not None:
            order, bounds = best_fit(self.lengths[samples], self.pack_to)
            packs = Rows(samples[order], bounds)
            return packs.take(rng.permutation(len(packs))) if self.shuffle else packs
        if self.shuffle:
            step = self.batch_size * self.accumulate * self.world
            samples = _grouped_by_length(samples, self.lengths, step, rng)
        return Rows(samples, _numbers(len(samples) + 1))


def _numbers(count: int) -> np.ndarray:
    """0, 1, … in as few bytes as that takes: a plan holds one for every sample."""
    return np.arange(count, dtype=np.int32 if count <= np.iinfo(np.int32).max else np.int64)


def _size(source: MixedSource) -> int:
    return round(source.weight * len(source.samples))


def _drawn(source: MixedSource, rng: np.random.Generator) -> np.ndarray:
    """round(weight * n) samples: whole repeats and a random choice for the rest."""
    repeats, rest = divmod(_size(source), len(source.samples)) if len(source.samples) else (0, 0)
    return np.concatenate([np.tile(source.samples, repeats), rng.choice(source.samples, rest, replace=False)])


def _grouped_by_length(samples: np.ndarray, lengths: np.ndarray, step: int, rng: np.random.Generator) -> np.ndarray:
    """Shuffled samples, sorted by length within pools of many steps, the full steps in random order again."""
    full = len(samples) // step
    least = int(np.clip(len(samples) // _POOL_SAMPLES, _LEAST_POOLS, _MOST_LEAST_POOLS))
    pools = max(1, min(full, max(least, -(-full // _POOL_STEPS))))
    # A pool begins with a full step; the rest goes with the last one.
    starts = [-(-pool * full // pools) * step for pool in range(pools)]
    grouped = np.empty_like(samples)
    for start, end in pairwise([*starts, len(samples)]):  # pool by pool: no copies of all, and faster than all at once
        grouped[start:end] = samples[start:end][np.argsort(-lengths[samples[start:end]], kind="stable")]
    samples[: full * step].reshape(full, step)[:] = grouped[: full * step].reshape(full, step)[rng.permutation(full)]
    samples[full * step :] = grouped[full * step :]
    return samples
