"""The machinery of `selection.select`: exact shares per cluster, filled from one stable sort."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def lowest_by_quota(
    values: NDArray[Any], fraction: float, labels: NDArray[Any] | None, *, middle: bool
) -> NDArray[np.int64]:
    """The lowest round(fraction * defined) values, each cluster giving its share, equal ones in index order.

    Args:
        values: float32 or float64 [samples]; nan = undefined, never chosen.
        fraction: in (0, 1].
        labels: clusters from 0 on [samples], as `compact` gives them; None = one cluster.
        middle: take the middle of each cluster's ranking instead of its low end.

    Returns:
        Sorted indices.
    """
    kept = ~np.isnan(values)
    count = round(fraction * int(np.count_nonzero(kept)))
    if count == 0:
        return np.empty(0, np.int64)
    if labels is None and not middle:  # what lies beyond the last one taken, nan included, need not be sorted
        kept = values <= np.partition(values, count - 1)[count - 1]
    values = values[kept]
    keys, sizes = _digits(values), np.array([len(values)])
    if labels is not None:
        labels = labels[kept]
        keys, sizes = (*keys, *_digits(labels)), np.bincount(labels)
    ranking = np.lexsort(keys)  # stable: by cluster, then by value, then by index
    starts = np.cumsum(sizes) - sizes

    quotas, remainder = np.divmod(count * sizes, len(values))
    # Only a cluster with a remainder can be rounded up, and it has a sample beyond its floor.
    candidates = np.flatnonzero(remainder)
    tie = values[ranking[(starts + (sizes // 2 if middle else quotas))[candidates]]]
    if middle:
        place = np.argsort(np.argsort(tie, kind="stable"))
        tie = np.abs(4 * place - 2 * len(place) + 3)  # the lower of two as near
    winners = np.lexsort((tie, -remainder[candidates]))[: count - quotas.sum()]
    quotas[candidates[winners]] += 1

    below = (sizes - quotas) // 2 if middle else np.zeros_like(sizes)
    runs = np.stack([below, quotas, sizes - quotas - below], axis=1)
    chosen = np.repeat(np.tile([False, True, False], len(sizes)), runs.reshape(-1))
    return np.sort(np.flatnonzero(kept)[ranking[chosen]])


def _digits(numbers: NDArray[Any]) -> tuple[NDArray[np.uint16], ...]:
    """The numbers as 16-bit digits, least first: np.lexsort takes such keys in linear time, at full precision."""
    if numbers.dtype.kind == "f":
        bits = (numbers + numbers.dtype.type(0)).view(f"i{numbers.itemsize}")  # -0 and 0 are equal
        # The bits of IEEE floats sort as their values once the sign is flipped and negative ones are turned around.
        numbers = bits ^ (bits >> 8 * bits.itemsize - 1 | np.iinfo(bits.dtype).min)
    return tuple(numbers.view(np.uint16).reshape(len(numbers), -1).T)


def compact(labels: NDArray[Any], samples: int) -> NDArray[np.uint32]:
    """Cluster labels as whole numbers from 0 on, in the order of the labels, without gaps that matter."""
    if labels.shape != (samples,):
        raise ValueError(f"clusters must have one label per sample: found shape {labels.shape}, expected ({samples},)")
    if labels.dtype.kind not in "iubOUST":
        raise ValueError(f"clusters must be whole numbers or strings, found {labels.dtype}")
    # Dense ones are used as they are, without a sort; their differences are right modulo 2^bits, hence as unsigned.
    if labels.dtype.kind in "iu" and samples and int(labels.max()) - int(labels.min()) < samples:
        return (labels - labels.min()).view(f"u{labels.itemsize}").astype(np.uint32)
    return np.unique(labels, return_inverse=True)[1].reshape(-1).astype(np.uint32)
