import gzip
import json
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from lightning_itk.data.rows import Rows
from lightning_itk.data.sampler import BatchSampler, MixedSource

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(3, 200, 301)


def epoch_steps(lengths: np.ndarray, *, world: int, accumulate: int, epoch: int = 0, **options) -> list[list[int]]:
    """The samples of each optimizer step, over all ranks."""
    samplers = [BatchSampler(lengths, rank=r, world=world, accumulate=accumulate, **options) for r in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in samplers]
    assert all(len(of_rank) == len(sampler) for of_rank, sampler in zip(batches, samplers, strict=True))
    steps = []
    for start in range(0, len(batches[0]), accumulate):
        micro = [batch for of_rank in batches for batch in of_rank[start : start + accumulate]]
        steps.append(sorted(int(sample) for batch in micro for row in batch for sample in row))
    return steps


@pytest.mark.parametrize("count", [1, 3, 7, 8, 9, 64, 301])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("pack_to", [None, 256])
def test_a_step_has_the_same_samples_however_it_is_dealt(count: int, shuffle: bool, pack_to: int | None) -> None:
    lengths = LENGTHS[:count]
    for epoch in (0, 3):
        expected = None
        for batch_size, accumulate, world in [
            (8, 1, 1),
            (2, 4, 1),
            (4, 1, 2),
            (1, 4, 2),
            (1, 8, 1),
            (1, 1, 8),
            (1, 2, 4),
        ]:
            steps = epoch_steps(
                lengths, batch_size=batch_size, accumulate=accumulate, world=world, epoch=epoch, shuffle=shuffle,
                pack_to=pack_to,
            )  # fmt: skip
            assert sorted(sample for step in steps for sample in step) == list(range(count))
            expected = expected or steps
            assert steps == expected


def test_every_rank_has_as_many_batches_and_no_duplicates() -> None:
    for count in range(1, 40):
        for world, batch_size, accumulate in [(3, 2, 2), (4, 1, 1), (2, 3, 1)]:
            samplers = [
                BatchSampler(LENGTHS[:count], batch_size=batch_size, accumulate=accumulate, rank=r, world=world)
                for r in range(world)
            ]
            batches = [list(sampler) for sampler in samplers]
            assert len({len(of_rank) for of_rank in batches} | {len(sampler) for sampler in samplers}) == 1
            assert all(len(batch) <= batch_size for of_rank in batches for batch in of_rank)
            seen = [int(sample) for of_rank in batches for batch in of_rank for row in batch for sample in row]
            assert sorted(seen) == list(range(count))
            empty = sum(not batch for of_rank in batches for batch in of_rank)
            assert empty < world


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def order(epoch: int, seed: int = 0) -> list[int]:
        sampler = BatchSampler(LENGTHS, batch_size=4, seed=seed)
        sampler.set_epoch(epoch)
        return [int(row[0]) for batch in sampler for row in batch]

    assert order(1) == order(1)
    assert len({tuple(order(0)), tuple(order(1)), tuple(order(0, seed=1))}) == 3


def test_order_is_kept_without_shuffling() -> None:
    sampler = BatchSampler(LENGTHS, batch_size=4, shuffle=False)
    assert [int(row[0]) for batch in sampler for row in batch] == list(range(301))
    longest = BatchSampler(LENGTHS, batch_size=4, shuffle=False, longest_first=True)
    lengths = [LENGTHS[row[0]] for batch in longest for row in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_length_groups_save_padding_and_stay_random() -> None:
    lengths = np.random.default_rng(1).integers(10, 1000, 20_000)
    sampler = BatchSampler(lengths, batch_size=8)
    real = padded = 0
    means = []
    for batch in sampler:
        of_batch = [lengths[row[0]] for row in batch]
        real, padded = real + sum(of_batch), padded + len(batch) * max(of_batch)
        means.append(np.mean(of_batch))
    assert real / padded > 0.95
    correlation = np.corrcoef(means[:-1], means[1:])[0, 1]
    assert abs(correlation) < 0.1  # neighbouring steps have nothing to do with each other


def plan(lengths: np.ndarray, epoch: int = 0, **options) -> list[np.ndarray]:
    """The samples of each micro-batch of 8."""
    sampler = BatchSampler(lengths, batch_size=8, **options)
    sampler.set_epoch(epoch)
    return [np.concatenate(batch) for batch in sampler]


def transformers_plan(lengths: np.ndarray, seed: int) -> list[np.ndarray]:
    order = get_length_grouped_indices(lengths.tolist(), 8, generator=torch.Generator().manual_seed(seed))
    return [np.array(order[start : start + 8]) for start in range(0, len(order), 8)]


def fill(batches: list[np.ndarray], lengths: np.ndarray) -> float:
    """Real tokens over slots."""
    return sum(lengths[b].sum() for b in batches) / sum(len(b) * lengths[b].max() for b in batches)


def check_fill(lengths: np.ndarray) -> None:
    """At least that of transformers' group_by_length, mean over five sets and seeds."""
    for count in (40, 96, 100, 320, 3000):
        sets = [np.random.default_rng(seed).permutation(lengths)[:count] for seed in range(5)]
        ours = np.mean([fill(plan(some, seed=seed), some) for seed, some in enumerate(sets)])
        theirs = np.mean([fill(transformers_plan(some, seed), some) for seed, some in enumerate(sets)])
        assert ours >= theirs, (count, ours, theirs)


def test_as_little_padding_as_in_transformers() -> None:
    check_fill(np.random.default_rng(0).lognormal(5, 1, 12_000).clip(4, 2048).astype(int))


@pytest.mark.real_data
def test_as_little_padding_as_in_transformers_on_dolly(real_data: Path) -> None:
    with gzip.open(real_data / "dolly-15k.jsonl.gz", "rt", encoding="utf-8") as file:
        records = map(json.loads, file)
        texts = (record["instruction"] + record["context"] + record["response"] for record in records)
        check_fill(np.array([len(text) // 4 + 20 for text in texts]))


@pytest.mark.parametrize(("count", "most"), [(96, 0.3), (320, 0.25), (3000, 0.15)])
def test_other_samples_meet_in_every_epoch(count: int, most: float) -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, count).astype(int)
    epochs = [{pair for b in plan(lengths, epoch) for pair in combinations(sorted(b), 2)} for epoch in range(6)]
    again = [len(one & other) / len(one) for one, other in combinations(epochs, 2)]
    assert max(again) < most, again
    partners = Counter(sample for pair in set().union(*epochs) for sample in pair)
    assert min(partners[sample] for sample in range(count)) > 14  # one epoch gives 7


def test_a_checkpoint_of_older_length_groups_is_told_apart() -> None:
    name = "version of the length groups"
    assert BatchSampler(LENGTHS, batch_size=4).signature()[name] == 2
    assert BatchSampler(LENGTHS, batch_size=4, shuffle=False).signature()[name] is None  # the same plans as ever
    assert BatchSampler(LENGTHS, batch_size=4, pack_to=256).signature()[name] is None


def test_packs_hold_what_fits() -> None:
    sampler = BatchSampler(LENGTHS, batch_size=2, pack_to=256)
    rows = [row for batch in sampler for row in batch]
    assert all(LENGTHS[row].sum() <= 256 for row in rows)
    assert sum(LENGTHS) / (256 * len(rows)) > 0.95
    sampler.set_epoch(1)
    assert {tuple(sorted(row)) for row in rows} != {tuple(sorted(row)) for batch in sampler for row in batch}


@pytest.mark.parametrize("pack_to", [None, 256])
def test_weights(pack_to: int | None) -> None:
    sources = [
        MixedSource(np.arange(100), 2.0),
        MixedSource(np.arange(100, 200), 0.25),
        MixedSource(np.arange(200, 301), 1.5),
    ]
    sampler = BatchSampler(LENGTHS, batch_size=4, pack_to=pack_to, sources=sources)
    halves = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)  # also where packs of other samples are more or fewer
        seen = Counter(int(sample) for batch in batches for row in batch for sample in row)
        assert all(seen[i] == 2 for i in range(100))
        assert sum(seen[i] for i in range(100, 200)) == 25
        assert max(seen[i] for i in range(100, 200)) == 1
        assert sum(seen[i] for i in range(200, 301)) == round(1.5 * 101)
        halves.append(frozenset(i for i in range(100, 200) if seen[i]))
    assert len(set(halves)) == 4


def test_batches_can_start_anywhere() -> None:
    for options in ({}, {"accumulate": 3}, {"pack_to": 256}, {"accumulate": 3, "world": 2, "rank": 1}):
        sampler = BatchSampler(LENGTHS, batch_size=2, **options)  # type: ignore[arg-type]
        whole = [[row.tolist() for row in batch] for batch in sampler]
        for start in (0, 1, 2, 3, 4, len(whole) - 1, len(whole)):
            assert [[row.tolist() for row in batch] for batch in sampler.batches(start)] == whole[start:]


def test_rows_take_and_split() -> None:
    rows = Rows(np.arange(6), np.array([0, 3, 4, 6]))
    taken = replace(rows, order=np.array([2, 0, 1]))
    assert [taken[i].tolist() for i in range(3)] == [[4, 5], [0, 1, 2], [3]]
    for count in range(3, 7):
        split = rows.split_to(count)
        assert len(split) == count
        assert np.concatenate([split[i] for i in range(count)]).tolist() == list(range(6))
    assert len(rows.split_to(99)) == 6


def test_an_epoch_without_samples_has_no_batches() -> None:
    for shuffle, pack_to in ((True, None), (False, 256)):
        sources = [MixedSource(np.arange(1), 0.3)]
        sampler = BatchSampler(LENGTHS, batch_size=2, accumulate=3, shuffle=shuffle, pack_to=pack_to, sources=sources)
        assert len(sampler) == len(list(sampler)) == 0
