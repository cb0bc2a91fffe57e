"""The machinery of `selection.select`: exact shares per cluster, filled by sorting packed keys."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 22  # rows handled at once where temporaries would otherwise be as long as the data
_UNDEFINED = np.uint64(0xFFFFFFFF)  # sorts behind every number


def lowest_by_quota(
    values: NDArray[Any], missing: NDArray[np.bool_], fraction: float, labels: NDArray[Any] | None, *, middle: bool
) -> NDArray[np.int64]:
    """The lowest round(fraction * defined) values, each cluster giving its share.

    Args:
        values: floats [samples].
        missing: the undefined ones [samples], never chosen.
        fraction: in (0, 1].
        labels: clusters from 0 on [samples]; None = one cluster.
        middle: take the middle of each cluster's ranking instead of its low end.

    Returns:
        Sorted indices.
    """
    defined = len(values) - int(np.count_nonzero(missing))
    count = round(fraction * defined)
    if count == 0:
        return np.empty(0, np.int64)
    keys = _keys(values, missing, labels)
    if labels is None and not middle:
        return np.flatnonzero(_lowest(values, keys, keys, np.zeros(1, np.int64), np.array([count])))
    ordered = np.sort(keys)
    if labels is None:
        starts, sizes = np.zeros(1, np.int64), np.array([defined])
    else:
        first = np.arange(int(labels.max()) + 1, dtype=np.uint64) << np.uint64(32)
        starts = np.searchsorted(ordered, first)
        sizes = np.searchsorted(ordered, first | _UNDEFINED) - starts
    quotas = _quotas(count, sizes, ordered, starts, middle=middle)
    if not middle:
        return np.flatnonzero(_lowest(values, keys, ordered, starts, quotas))
    below = (sizes - quotas) // 2
    upto = _lowest(values, keys, ordered, starts, below + quotas)
    return np.flatnonzero(upto & ~_lowest(values, keys, ordered, starts, below))


def _quotas(
    count: int, sizes: NDArray[Any], ordered: NDArray[Any], starts: NDArray[Any], *, middle: bool
) -> NDArray[np.int64]:
    """Shares of `count` proportional to `sizes`, whole by largest remainder; never above a size."""
    quotas, remainder = np.divmod(count * sizes, sizes.sum())
    # Only a cluster with a remainder can be rounded up, and it has a sample beyond its floor.
    candidates = np.flatnonzero(remainder)
    if len(candidates):
        position = starts + (sizes // 2 if middle else quotas)
        tie = (ordered[position[candidates]] & ordered.dtype.type(_UNDEFINED)).astype(np.int64)
        if middle:
            tie = np.abs(4 * np.argsort(np.argsort(tie)) - 2 * len(tie) + 3)  # the lower of two as near
        winners = np.lexsort((tie, -remainder[candidates]))[: count - quotas.sum()]
        quotas[candidates[winners]] += 1
    return quotas


def _keys(values: NDArray[Any], missing: NDArray[np.bool_], labels: NDArray[Any] | None) -> NDArray[Any]:
    """Whole numbers that sort as (cluster, float32 score, undefined last): 4 bytes a row, 8 with clusters."""
    keys = np.empty(len(values), np.uint32 if labels is None else np.uint64)
    for start in range(0, len(values), _BLOCK):
        rows = slice(start, start + _BLOCK)
        with np.errstate(over="ignore", invalid="ignore"):
            single = values[rows].astype(np.float32) + np.float32(0)  # -0 and 0 are equal
        bits = single.view(np.uint32)
        # The bits of IEEE floats sort as their values once the sign is flipped and negative ones are turned around.
        bits = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
        bits[missing[rows]] = _UNDEFINED
        keys[rows] = bits if labels is None else labels[rows].astype(np.uint64) << np.uint64(32) | bits
    return keys


def _lowest(
    values: NDArray[Any], keys: NDArray[Any], ordered: NDArray[Any], starts: NDArray[Any], counts: NDArray[Any]
) -> NDArray[np.bool_]:
    """Mark the `counts[c]` lowest samples of each cluster, equal ones in index order."""
    clustered = keys.dtype == np.uint64
    asked = counts > 0
    limits = np.zeros(len(counts), keys.dtype)
    if ordered is keys:  # not sorted: one cluster, one limit
        limits[:] = np.partition(keys, counts[0] - 1)[counts[0] - 1]
    else:
        limits[asked] = ordered[(starts + counts - 1)[asked]]
    chosen, ties = np.empty(len(keys), np.bool_), []
    for start in range(0, len(keys), _BLOCK):
        block = keys[start : start + _BLOCK]
        limit = limits[block >> np.uint64(32)] if clustered else limits[0]
        chosen[start : start + _BLOCK] = block < limit
        ties.append(np.flatnonzero(block == limit) + start)
    tied = np.concatenate(ties)
    group = (keys[tied] >> np.uint64(32)).astype(np.int64) if clustered else np.zeros(len(tied), np.int64)
    tied, group = tied[asked[group]], group[asked[group]]
    # Scores that float32 cannot tell apart are put in order by their full precision.
    by_score = np.lexsort((values[tied], group))
    tied, group = tied[by_score], group[by_score]
    if ordered is keys:
        wanted = counts - np.count_nonzero(chosen)
    else:
        wanted = counts - (np.searchsorted(ordered, limits) - starts)
    place = np.arange(len(tied)) - np.searchsorted(group, group)
    chosen[tied[place < wanted[group]]] = True
    return chosen


def compact(labels: NDArray[Any], samples: int) -> NDArray[Any]:
    """Cluster labels as whole numbers from 0 on, without gaps that matter."""
    if labels.shape != (samples,):
        raise ValueError(f"clusters must have one label per sample: found shape {labels.shape}, expected ({samples},)")
    if labels.dtype.kind not in "iubOUST":
        raise ValueError(f"clusters must be whole numbers or strings, found {labels.dtype}")
    if labels.dtype.kind in "iu" and samples:  # dense enough to be used as they are, without a sort
        low, high = int(labels.min()), int(labels.max())
        if high - low < max(samples, 1 << 20):
            return labels if low == 0 else (labels.astype(np.int64) - low).astype(np.int32)
    return np.unique(labels, return_inverse=True)[1].reshape(-1)
