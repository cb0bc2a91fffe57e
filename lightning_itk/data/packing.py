"""Best-fit-decreasing packing of samples into rows of a fixed length."""

import numpy as np

from lightning_itk.data.order import blocks, kind, longest_first, numbers, row_by_row
from lightning_itk.data.records import DataError


def best_fit(lengths: np.ndarray, max_length: int, samples: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pack samples: from the longest on, each goes into the fullest row that still has room for it.

    The number of rows depends on the lengths only; samples of equal length are taken in the given order, so a shuffled
    input gives other rows. Ten million samples take seconds, and about 12 bytes each beside the result.

    Args:
        lengths: tokens of each sample.
        max_length: tokens of a row.
        samples: numbers of those to pack [samples]; None = all.

    Returns:
        Sample numbers row after row [samples], and the row boundaries in it [rows + 1].

    Raises:
        DataError: a sample is longer than a row.
    """
    lengths = np.asarray(lengths)
    samples = numbers(len(lengths)) if samples is None else samples
    longest, counts = 0, np.zeros(max_length + 1, np.int64)
    for part in blocks(len(samples)):
        some = lengths[samples[part]]
        longest = max(longest, int(some.max()))
        if longest <= max_length:
            counts += np.bincount(some, minlength=max_length + 1)
    if longest > max_length:
        raise DataError(f"a sample of {longest} tokens does not fit a pack of max_length={max_length}")
    samples = longest_first(samples, lengths)
    row_of, bounds = _rows(counts)
    return row_by_row(samples, row_of, bounds[1:]), bounds


def _rows(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row of each sample, from the longest on [samples]; 0, and where each row starts [rows + 1].

    Args:
        counts: samples of each length, up to that of a row.
    """
    max_length = len(counts) - 1
    # All samples of a length go at once: the fullest row that has room takes as many as fit, before the next one does.
    open_rows: list[list[np.ndarray]] = [[] for _ in range(max_length + 1)]  # by tokens of room left, the newest last
    rooms = 0  # bit r is set where a row with r tokens of room is open
    count = int(counts.sum())
    row_of, sizes = np.empty(count, kind(count)), np.zeros(count, kind(count))  # zeros take memory when written to
    rows = placed = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        end = placed + int(counts[length])
        while placed < end:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else max_length  # the fullest rows
            each = room // length if length else end - placed
            needed = -(-(end - placed) // each)
            if fitting:
                stack = np.concatenate(open_rows[room])[::-1]
                open_rows[room], rooms = [], rooms ^ (1 << room)
                taken, rest = stack[:needed], stack[needed:]
                if len(rest):
                    open_rows[room], rooms = [rest[::-1]], rooms | (1 << room)
            else:
                taken = np.arange(rows, rows + needed, dtype=kind(count))
                rows += needed
            into = np.repeat(taken, each)[: end - placed]
            row_of[placed : placed + len(into)] = into
            placed += len(into)
            last = len(into) - (len(taken) - 1) * each  # the last row may get fewer
            for some, size in ((taken[:-1], each), (taken[-1:], last)):
                if len(some):
                    left = room - size * length
                    sizes[some] += size
                    open_rows[left].append(some)
                    rooms |= 1 << left
    bounds = np.zeros(rows + 1, kind(count))
    np.cumsum(sizes[: max(rows - 1, 0)], out=bounds[2:])
    return row_of, bounds
