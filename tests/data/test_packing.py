import numpy as np
import pytest

from lightning_itk.data.packing import best_fit


def plain_best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """The textbook: each sample, longest first, into the fullest row that takes it."""
    rows: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rooms = [size - sum(lengths[i] for i in row) for row in rows]
        fitting = [(room, row) for room, row in zip(rooms, rows, strict=True) if room >= lengths[sample]]
        if fitting:
            min(fitting, key=lambda pair: pair[0])[1].append(sample)
        else:
            rows.append([sample])
    return rows


@pytest.mark.parametrize("size", [7, 64, 100])
def test_as_full_as_the_textbook(size: int) -> None:
    rng = np.random.default_rng(size)
    for count in (0, 1, 2, 50, 300):
        lengths = rng.integers(1, size + 1, count)
        order, bounds = best_fit(lengths, size)
        assert sorted(order.tolist()) == list(range(count))
        loads = [lengths[order[start:end]].sum() for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
        assert all(0 < load <= size for load in loads)
        plain = plain_best_fit(lengths.tolist(), size)
        assert sorted(loads) == sorted(sum(int(lengths[i]) for i in row) for row in plain)


def test_many_samples_are_packed_fully_and_repeatably() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 0.8, 50_000).astype(int) + 1, 2048)
    order, bounds = best_fit(lengths, 2048)
    assert lengths.sum() / (2048 * (len(bounds) - 1)) > 0.999
    again, same = best_fit(lengths, 2048)
    assert (order == again).all()
    assert (bounds == same).all()
    shuffled = np.random.default_rng(1).permutation(len(lengths))
    _, other = best_fit(lengths[shuffled], 2048)
    assert len(other) == len(bounds)  # the number of rows does not depend on the order


def test_too_long() -> None:
    with pytest.raises(ValueError, match="9 tokens does not fit a pack of max_length=8"):
        best_fit(np.array([3, 9]), 8)
