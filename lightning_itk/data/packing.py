"""Best-fit-decreasing packing of samples into rows of a fixed length."""

import numpy as np

from lightning_itk.data.records import DataError


def best_fit(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack samples: from the longest on, each goes into the fullest row that still has room for it.

    The number of rows depends on the lengths only; samples of equal length are taken in the given order, so a shuffled
    input gives other rows. Ten million samples take seconds.

    Args:
        lengths: tokens of each sample [samples].
        max_length: tokens of a row.

    Returns:
        Sample numbers row after row [samples], and the row boundaries in it [rows + 1].

    Raises:
        DataError: a sample is longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and int(lengths.max()) > max_length:
        raise DataError(f"a sample of {int(lengths.max())} tokens does not fit a pack of max_length={max_length}")
    order = np.argsort(-lengths, kind="stable")
    # All samples of a length go at once: the fullest row that has room takes as many as fit, before the next one does.
    open_rows: list[list[np.ndarray]] = [[] for _ in range(max_length + 1)]  # by tokens of room left, the newest last
    rooms = 0  # bit r is set where a row with r tokens of room is open
    row_of = np.empty(len(lengths), np.int64)
    rows = placed = 0
    found, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(found[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = placed + count
        while placed < end:
            if fitting := rooms >> length:
                room = length + (fitting & -fitting).bit_length() - 1  # the lowest set bit: the fullest rows
                stack = np.concatenate(open_rows[room])[::-1]
                open_rows[room], rooms = [], rooms ^ (1 << room)
            else:
                room, stack = max_length, np.arange(rows, rows + count)  # more than are needed
            each = room // length if length else count
            needed = -(-(end - placed) // each)
            taken, rest = stack[:needed], stack[needed:]
            if not fitting:
                rows += len(taken)
            elif len(rest):
                open_rows[room], rooms = [rest[::-1]], rooms | (1 << room)
            into = np.repeat(taken, each)[: end - placed]
            row_of[placed : placed + len(into)] = into
            placed += len(into)
            last = len(into) - (len(taken) - 1) * each  # the last row may get fewer
            for some, size in ((taken[:-1], each), (taken[-1:], last)):
                if len(some):
                    left = room - size * length
                    open_rows[left].append(some)
                    rooms |= 1 << left
    by_row = np.argsort(row_of, kind="stable")
    return order[by_row], np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))]).astype(np.int64)
