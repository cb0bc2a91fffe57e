"""Which samples training draws from, which are held out, which are chosen: of many worked out once per machine."""

from pathlib import Path
from typing import Any

import numpy as np

from lightning_itk.data.loader import SampleSet
from lightning_itk.data.order import numbers, where
from lightning_itk.data.subset import Subset, choose, depends_on, held_out


def divide(samples: SampleSet, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the samples that training draws from, and of those that are held out, ascending.

    Args:
        samples: all of them.
        share: to hold out; 0 = none.
        seed: another seed holds out others.

    Raises:
        DataError: as `held_out`.
    """

    def make() -> dict[str, np.ndarray]:
        if not share:
            return {"pool": numbers(len(samples)), "held_out": numbers(0)}
        out = held_out(samples.digests, share, seed)
        return {"pool": where(~out), "held_out": where(out)}

    found = samples.shared_numbers(("pool", "held_out"), lambda: [share, seed], make)
    return found["pool"], found["held_out"]


def choose_shared(subset: Subset, samples: SampleSet, pool: np.ndarray, division: list[Any], notes: Path) -> np.ndarray:
    """The numbers of the samples that a subset chooses, ascending.

    Args:
        subset: what to choose.
        samples: all of them.
        pool: those to choose from, of `divide`.
        division: what made the pool.
        notes: folder of hashes of files.

    Raises:
        DataError: as `choose`.
    """
    columns = (samples.sample_ids, samples.learned)
    return samples.shared_numbers(
        ("chosen",),
        lambda: [*division, *depends_on(subset, notes)],
        lambda: {"chosen": choose(subset, pool, *columns, fingerprint=samples.fingerprint)},
    )["chosen"]
