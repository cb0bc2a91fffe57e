"""Best-fit-decreasing packing of samples into rows of a fixed length."""

import numpy as np

from lightning_itk.data.records import DataError


def best_fit(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack samples: from the longest on, each goes into the fullest row that still has room for it.

    The number of rows depends on the lengths only; samples of equal length are taken in the given order, so a shuffled
    input gives other rows. A million samples take seconds.

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
    open_rows: list[list[int]] = [[] for _ in range(max_length + 1)]  # by tokens of room left
    rooms = 0  # bit r is set where a row with r tokens of room is open
    row_of = np.empty(len(lengths), np.int64)
    rows = 0
    for place, length in enumerate(lengths[order].tolist()):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest set bit: the fullest row
            candidates = open_rows[room]
            row = candidates.pop()
            if not candidates:
                rooms ^= 1 << room
        else:
            room, row = max_length, rows
            rows += 1
        row_of[place] = row
        left = room - length
        if not open_rows[left]:
            rooms |= 1 << left
        open_rows[left].append(row)
    by_row = np.argsort(row_of, kind="stable")
    return order[by_row], np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))]).astype(np.int64)
