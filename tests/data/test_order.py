"""Orders of many samples: as NumPy's own, in a few bytes a sample."""

import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from lightning_itk.data import order
from lightning_itk.data.order import longest_first, numbers, row_by_row, where
from lightning_itk.data.packing import best_fit
from lightning_itk.data.sampler import BatchSampler, MixedSource
from lightning_itk.data.subset import held_out


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones: a few thousand samples then stand for many."""
    monkeypatch.setattr(order, "_BLOCK", 100)


@pytest.mark.parametrize("most", [1, 90, 1 << 17, 1 << 30])
def test_longest_first_is_a_stable_sort(most: int) -> None:
    rng = np.random.default_rng(most)
    lengths = rng.integers(0, most, 1234)
    samples = rng.permutation(numbers(1234))[:987]
    assert longest_first(samples, lengths).tolist() == samples[np.argsort(-lengths[samples], kind="stable")].tolist()
    assert longest_first(samples[:0], lengths).tolist() == []


def test_rows_and_masks() -> None:
    rng = np.random.default_rng(0)
    samples, row_of = rng.permutation(numbers(1000)), rng.integers(0, 300, 1000)
    starts = np.cumsum(np.bincount(row_of, minlength=300)) - np.bincount(row_of, minlength=300)
    ends = np.append(starts[1:], 1000)
    assert row_by_row(samples, row_of, starts).tolist() == samples[np.argsort(row_of, kind="stable")].tolist()
    assert starts.tolist() == ends.tolist()
    assert where(row_of < 30).tolist() == np.flatnonzero(row_of < 30).tolist()
    assert {where(row_of < 30).dtype, numbers(9).dtype} == {np.dtype(np.int32)}


def test_the_validation_share_is_that_of_a_sort() -> None:
    digests = np.random.default_rng(0).integers(0, 2**64, 2500, dtype=np.uint64)
    digests[::7] = digests[0]  # copies keep together
    for share in (1e-9, 0.02, 0.3, 0.99):
        out = held_out(digests, share, seed=3)
        order._BLOCK = 10**6  # monkeypatch puts it back
        assert out.tolist() == held_out(digests, share, seed=3).tolist()
        order._BLOCK = 100
        assert out.sum() >= max(1, round(share * 2500))
        assert out[::7].all() or not out[::7].any()


def plain_steps(lengths: np.ndarray, sources: list[MixedSource], step: int, pack_to: int | None, epoch: int) -> Any:
    """The samples of every step, written down as plainly as can be: plans of earlier versions are these."""
    rng = np.random.default_rng([0, epoch])
    drawn = []
    for samples, weight in sources:
        repeats, rest = divmod(round(weight * len(samples)), len(samples))
        drawn += [np.tile(samples, repeats), rng.choice(samples, rest, replace=False)]
    samples = np.concatenate(drawn)
    rng.shuffle(samples)
    if pack_to is not None:
        packed, bounds = best_fit(lengths[samples], pack_to)
        rows = [samples[packed[start:end]] for start, end in pairwise(bounds)]
        rows = [rows[i] for i in rng.permutation(len(rows))]
        return [np.concatenate(rows[start : start + step]).tolist() for start in range(0, len(rows), step)]
    full = len(samples) // step
    pools = max(1, min(full, max(int(np.clip(len(samples) // 160, 3, 8)), -(-full // 64))))
    starts = [-(-pool * full // pools) * step for pool in range(pools)]
    pooled = [samples[start:end] for start, end in pairwise([*starts, len(samples)])]
    grouped = np.concatenate([pool[np.argsort(-lengths[pool], kind="stable")] for pool in pooled])
    steps = [grouped[start : start + step].tolist() for start in range(0, len(grouped), step)]
    return [steps[i] for i in rng.permutation(full)] + steps[full:]


@pytest.mark.parametrize("pack_to", [None, 256])
@pytest.mark.parametrize("step", [1, 3, 8])
def test_epochs_have_the_order_of_earlier_versions(pack_to: int | None, step: int) -> None:
    lengths = np.random.default_rng(1).integers(3, 200, 2500).astype(np.int32)
    three = [
        MixedSource(np.arange(900), 1.0),
        MixedSource(np.arange(900, 2000), 2.0),
        MixedSource(np.arange(2000, 2500), 1.0),
    ]
    for sources in ([MixedSource(numbers(2500))], three, [MixedSource(np.arange(1000, 2500, 2), 1.4)]):
        sampler = BatchSampler(lengths, batch_size=step, pack_to=pack_to, sources=sources)
        for epoch in (0, 5):
            sampler.set_epoch(epoch)
            expected = plain_steps(lengths, sources, step, pack_to, epoch)[: len(sampler)]
            found = [np.concatenate(batch).tolist() for batch in sampler][: len(expected) - 1]
            assert [sorted(some) for some in found] == [sorted(some) for some in expected[: len(found)]]


def peak_of(action: Callable[[], Any]) -> int:
    tracemalloc.start()
    kept = action()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return peak


def first(sampler: BatchSampler) -> Iterator[Any]:
    batches = iter(sampler)
    next(batches)
    return batches


@pytest.mark.parametrize(("options", "most"), [({}, 5), ({"pack_to": 2048}, 16), ({"longest_first": True}, 11)])
def test_an_epoch_is_planned_in_a_few_bytes_a_sample(options: dict, most: float, monkeypatch) -> None:
    monkeypatch.setattr(order, "_BLOCK", 1 << 12)
    count = 200_000
    lengths = np.random.default_rng(0).lognormal(5, 0.8, count).clip(8, 2048).astype(np.int32)
    sources = [MixedSource(numbers(count))]
    shuffle = "longest_first" not in options

    def made() -> Any:
        return first(BatchSampler(lengths, batch_size=8, shuffle=shuffle, sources=sources, **options))

    assert peak_of(made) / count < most


def test_a_share_is_held_out_in_a_few_bytes_a_sample(monkeypatch) -> None:
    monkeypatch.setattr(order, "_BLOCK", 1 << 12)
    digests = np.random.default_rng(0).integers(0, 2**64, 200_000, dtype=np.uint64)
    assert peak_of(lambda: held_out(digests, 0.02, 0)) / 200_000 < 9  # of it 6 for counts, which do not grow
