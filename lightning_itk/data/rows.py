"""The rows of an epoch: which samples are in each, and in which order they are trained on."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Rows of an epoch in the order in which they are trained on.

    Attributes:
        samples: sample numbers, row after row as the rows were made.
        bounds: where each of those starts in `samples`, and the end [rows + 1]; None = a sample each.
        order: the order of groups of rows [groups]; rows behind the last group stay there. None = as they were made.
        group: rows of a group.
    """

    samples: np.ndarray
    bounds: np.ndarray | None = None
    order: np.ndarray | None = None
    group: int = 1

    def __len__(self) -> int:
        return len(self.samples) if self.bounds is None else len(self.bounds) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        place = int(self.places(np.array([row]))[0])
        start, end = (place, place + 1) if self.bounds is None else self.bounds[place : place + 2]
        return self.samples[start:end]

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Where rows stand among those that were made."""
        if self.order is None or not len(self.order):
            return rows
        group, within = np.divmod(rows, self.group)
        moved = self.order[group.clip(max=len(self.order) - 1)].astype(np.int64) * self.group + within
        return np.where(group < len(self.order), moved, rows)

    def split_to(self, count: int) -> "Rows":
        """At least `count` rows, as far as there are samples: packs give their last sample a row of its own."""
        if len(self) >= count or self.bounds is None:
            return self
        places = self.places(np.arange(len(self)))
        sizes = np.diff(self.bounds)[places]
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        samples = self.samples[np.arange(bounds[-1]) + np.repeat(self.bounds[places] - bounds[:-1], sizes)]
        while len(bounds) - 1 < count and len(splittable := np.flatnonzero(np.diff(bounds) > 1)):
            bounds = np.union1d(bounds, bounds[splittable[: count - len(bounds) + 1] + 1] - 1)
        return Rows(samples, bounds)
