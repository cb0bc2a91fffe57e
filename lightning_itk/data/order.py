"""Samples in the order of a key, in little more memory than their numbers take."""

from collections.abc import Iterator
from typing import Any

import numpy as np

_BLOCK = 1 << 18  # samples that are looked at together
_MOST_LENGTHS = 1 << 24  # beyond these nothing is gained by counting


def kind(count: int) -> type[np.signedinteger[Any]]:
    """The shortest type that counts so many samples: a plan of an epoch holds a number for every one."""
    return np.int32 if count <= np.iinfo(np.int32).max else np.int64


def numbers(count: int) -> np.ndarray:
    """0, 1, … up to a count of samples."""
    return np.arange(count, dtype=kind(count))


def where(mask: np.ndarray) -> np.ndarray:
    """The numbers of the samples for which a mask [samples] is true."""
    found = np.empty(np.count_nonzero(mask), kind(len(mask)))
    end = 0
    for part in blocks(len(mask)):
        some = np.flatnonzero(mask[part])
        found[end : end + len(some)] = some + part.start
        end += len(some)
    return found


def blocks(count: int) -> Iterator[slice]:
    """Slices that cover so many samples, some at a time."""
    return (slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))


def longest_first(samples: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Samples from the longest on, those of one length in the order given.

    Args:
        samples: their numbers [samples].
        lengths: tokens of all that has a number; looked at block by block.

    Returns:
        The numbers in a new array [samples].
    """

    def of_blocks() -> Iterator[np.ndarray]:
        return (lengths[samples[part]] for part in blocks(len(samples)))

    if not len(samples):
        return samples.copy()
    least, most = min(int(some.min()) for some in of_blocks()), max(int(some.max()) for some in of_blocks())
    if most - least >= _MOST_LENGTHS:
        return samples[np.argsort(-lengths[samples].astype(np.int64), kind="stable")]
    sizes = np.zeros(most - least + 1, np.int64)
    for some in of_blocks():
        sizes += np.bincount(most - some, minlength=len(sizes))
    dtype = np.uint16 if len(sizes) <= 1 << 16 else np.int32  # NumPy sorts two bytes in linear time
    return _grouped(samples, ((most - some).astype(dtype) for some in of_blocks()), np.cumsum(sizes) - sizes)


def row_by_row(samples: np.ndarray, row_of: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Samples row after row, those of one row in the order given.

    Args:
        samples: their numbers [samples].
        row_of: the row of each [samples].
        starts: where each row is to start [rows]; they become its ends.

    Returns:
        The numbers in a new array [samples].
    """
    return _grouped(samples, (row_of[part] for part in blocks(len(samples))), starts)


def _grouped(samples: np.ndarray, keys: Iterator[np.ndarray], free: np.ndarray) -> np.ndarray:
    """A counting sort, a block at a time: every sample goes to the first free place of its key."""
    result = np.empty_like(samples)
    for part, block in zip(blocks(len(samples)), keys, strict=True):
        order = np.argsort(block, kind="stable")
        block = block[order]
        first = np.flatnonzero(np.concatenate([[True], block[1:] != block[:-1]]))
        counts, found = np.diff(first, append=len(block)), block[first]
        result[np.arange(len(block)) + np.repeat(free[found] - first, counts)] = samples[part][order]
        free[found] += counts.astype(free.dtype)
    return result
