"""Which samples are held out for validation."""

import numpy as np

from lightning_itk.data.records import DataError


def held_out(digests: np.ndarray, share: float, seed: int) -> np.ndarray:
    """True for round(share * samples) samples, at least one; equal conversations stay on one side.

    Args:
        digests: uint64 hash of each sample's conversation [samples].
        share: of the samples to hold out.
        seed: another seed holds out others.

    Chosen by a hash of the conversation, so that a sample keeps its side whatever else is in the data set.
    """
    out = np.zeros(len(digests), bool)
    if share > 0:
        if len(digests) < 2:
            raise DataError("a validation share needs at least 2 samples: set validation to 0 or to a file")
        mixed = _mix(digests ^ _mix(np.array([seed], np.uint64)))
        cut = np.sort(mixed)[max(1, round(share * len(digests))) - 1]
        out = mixed <= cut
        if out.all():
            raise DataError("the validation share leaves nothing to train on: all conversations are equal, or too few")
    return out


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: spreads every bit over all."""
    values = values.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))
