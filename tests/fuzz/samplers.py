"""Which samples meet when: epochs over ranks, resumption, packing, quotas, and the batches that come of it."""

from collections import Counter

import numpy as np
import torch
from hypothesis import strategies as st

from lightning_itk import batch as b
from lightning_itk.batch import IGNORE_INDEX, Sample
from lightning_itk.data.loader import collate
from lightning_itk.data.packing import best_fit
from lightning_itk.data.sampler import BatchSampler, MixedSource
from lightning_itk.selection import select


def case(data: st.DataObject) -> str:
    """An epoch, a subset or a batch."""
    subject = data.draw(st.sampled_from([epoch, quotas, layouts]), label="subject")
    subject(data)
    return subject.__name__


def epoch(data: st.DataObject) -> None:
    """Every sample as often as its weight says, over all ranks; equally many batches; any position resumes."""
    lengths = np.array(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=120), label="lengths"))
    count, draw = len(lengths), data.draw
    cuts = sorted(draw(st.sets(st.integers(1, count - 1), max_size=2) if count > 1 else st.just(set()), label="cuts"))
    parts = np.split(np.random.default_rng(count).permutation(count), cuts)
    weights = [draw(st.sampled_from([1.0, 1.0, 0.5, 2.0, 0.3, 2.7, 0.01, 7]), label="weight") for _ in parts]
    options = {
        "batch_size": draw(st.integers(1, 9), label="batch_size"),
        "accumulate": draw(st.integers(1, 5), label="accumulate"),
        "shuffle": draw(st.booleans(), label="shuffle"),
        "pack_to": draw(st.none() | st.integers(int(lengths.max()), 80), label="pack_to"),
        "longest_first": draw(st.booleans(), label="longest_first"),
        "seed": draw(st.integers(0, 2**40), label="seed"),
        "sources": [MixedSource(part, weight) for part, weight in zip(parts, weights, strict=True)],
    }
    world, number = draw(st.integers(1, 6), label="world"), draw(st.integers(0, 3), label="epoch")

    def ranks(**changes: object) -> list[BatchSampler]:
        made = [BatchSampler(lengths, rank=rank, world=world, **{**options, **changes}) for rank in range(world)]
        for sampler in made:
            sampler.set_epoch(number)
        return made

    samplers = ranks()
    dealt = [[[row.tolist() for row in rows] for rows in sampler] for sampler in samplers]
    assert {len(batches) for batches in dealt} == {len(samplers[0])}, "ranks differ in their number of batches"
    seen = Counter(sample for batches in dealt for rows in batches for row in rows for sample in row)
    for part, weight in zip(parts, weights, strict=True):
        counts = [seen[int(sample)] for sample in part]
        assert sum(counts) == round(weight * len(part)), "an epoch holds another number of samples than the weight asks"
        assert not counts or max(counts) - min(counts) <= 1, "some samples come more often than others"
    assert sum(seen.values()) == sum(round(w * len(part)) for part, w in zip(parts, weights, strict=True))
    rows = [row for batches in dealt for cell in batches for row in cell]
    if options["pack_to"] is None:
        assert all(len(row) == 1 for row in rows)
        assert all(len(cell) <= options["batch_size"] for batches in dealt for cell in batches)
    else:
        assert all(row and lengths[row].sum() <= options["pack_to"] for row in rows)
    start = draw(st.integers(0, len(samplers[0])), label="start")
    for sampler, batches in zip(ranks(), dealt, strict=True):
        rest = [[row.tolist() for row in cell] for cell in sampler.batches(start)]
        assert rest == batches[start:], f"from batch {start} on the epoch goes on differently"
    if options["pack_to"] is None and options["accumulate"] % 2 == 0:  # the same step, cut another way
        other = ranks(batch_size=2 * options["batch_size"], accumulate=options["accumulate"] // 2)
        assert _steps(dealt, options["accumulate"]) == _steps(
            [[[row.tolist() for row in cell] for cell in sampler] for sampler in other], options["accumulate"] // 2
        ), "the samples of a step depend on how it is cut"


def _steps(dealt: list[list[list[list[int]]]], accumulate: int) -> list[list[int]]:
    batches = len(dealt[0])
    steps = [range(start, min(start + accumulate, batches)) for start in range(0, batches, accumulate)]
    return [sorted(s for ranks in dealt for i in step for row in ranks[i] for s in row) for step in steps]


def quotas(data: st.DataObject) -> None:
    """Exactly round(fraction * defined) samples, each cluster within one of its share, the lowest of each."""
    draw = data.draw
    scores = np.array(
        draw(
            st.lists(st.sampled_from([np.nan, 0.0, -0.0, 1.0]) | st.floats(-1e9, 1e9), min_size=1, max_size=60),
            label="scores",
        ),
        draw(st.sampled_from([np.float32, np.float64]), label="dtype"),
    )
    labels = draw(
        st.none() | st.lists(st.integers(-3, 5) | st.just(2**60), min_size=len(scores), max_size=len(scores)),
        label="clusters",
    )
    fraction, order = (
        draw(st.floats(1e-6, 1.0), label="fraction"),
        draw(st.sampled_from(["lowest", "highest", "random"])),
    )
    given = torch.from_numpy(scores) if draw(st.booleans(), label="tensor") else scores
    chosen = np.asarray(select(given, fraction, clusters=labels, order=order))
    kept = ~np.isnan(scores)
    assert len(set(chosen.tolist())) == len(chosen) == round(fraction * int(kept.sum()))
    assert (np.sort(chosen) == chosen).all()
    assert kept[chosen].all()
    groups = np.zeros(len(scores), np.int64) if labels is None else np.array(labels)
    taken = np.isin(np.arange(len(scores)), chosen)
    for group in np.unique(groups[kept]):
        members = kept & (groups == group)
        share = len(chosen) * members.sum() / kept.sum()
        assert abs((taken & members).sum() - share) < 1, "a cluster is more than one off its share"
        if order != "random" and (taken & members).any() and (~taken & members).any():
            inside, outside = scores[taken & members], scores[~taken & members]
            assert inside.max() <= outside.min() if order == "lowest" else inside.min() >= outside.max()


def layouts(data: st.DataObject) -> None:
    """Padded, packed, unpacked, selected and flat batches say the same of every sample."""
    draw = data.draw
    samples = []
    for number in range(draw(st.integers(1, 8), label="samples")):
        ids = np.array(draw(st.lists(st.integers(0, 50), min_size=1, max_size=9), label="ids"))
        learned = np.array(draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)), label="learned"))
        samples.append(Sample(ids, np.where(learned, ids, IGNORE_INDEX), number * 3, number % 2))
    wanted = {s.sample_id: s for s in samples}
    options = {"pad_id": draw(st.integers(0, 50)), "teachers": ("", "x"), "multiple": draw(st.integers(1, 8))}
    width = draw(st.integers(9, 30), label="row")
    order, bounds = best_fit(np.array([len(s.input_ids) for s in samples]), width)
    rows = [[samples[i] for i in order[start:end]] for start, end in zip(bounds, bounds[1:], strict=False)]
    assert all(sum(len(s.input_ids) for s in row) <= width for row in rows)
    padded, packed = b.pad(samples, **options), b.pack(rows, **options)
    keep_ids = draw(st.sets(st.sampled_from(sorted(wanted))), label="keep")
    made = {"pad": padded, "pack": packed, "unpack": b.unpack(packed), "unpack pad": b.unpack(padded)}
    made |= {"flatten": b.flatten(packed), "flatten pad": b.flatten(padded)}
    collated = {"collate pad": ([[s] for s in samples], False), "collate pack": (rows, True)}
    for name, (given, packing) in collated.items():
        made[name] = collate(given, pad_id=options["pad_id"], teachers=options["teachers"], packing=packing)
    for name, batch in made.items():
        _same(name, batch, wanted)
        keep = torch.isin(batch["sample_ids"], torch.tensor(sorted(keep_ids), dtype=torch.long))
        part = b.select(batch, keep)
        assert (part is None) == (not keep_ids)
        if part is not None:
            _same(f"select of {name}", part[0], {i: wanted[i] for i in keep_ids})


def _same(name: str, batch: b.Batch, wanted: dict[int, Sample]) -> None:
    places, targets, _ = b.response_rows(batch)
    assert b.count_targets(batch) == len(targets)
    ids = batch["sample_ids"].flatten()
    assert set(ids.tolist()) - {-1} == set(wanted), name
    assert ((ids < 0) == (batch["teacher_ids"].flatten() < 0)).all(), name
    assert (batch["labels"].flatten()[ids < 0] == IGNORE_INDEX).all(), f"{name}: padding is learned"
    assert b.cu_seqlens(batch)[-1] == ids.numel()
    for number, sample in wanted.items():
        here = (ids == number).nonzero().flatten()
        for key, expected in (("input_ids", sample.input_ids), ("labels", sample.labels)):
            assert batch[key].flatten()[here].tolist() == expected.tolist(), f"{name}: {key} of sample {number}"
        assert batch["position_ids"].flatten()[here].tolist() == list(range(len(here))), f"{name}: positions"
        assert set(batch["teacher_ids"].flatten()[here].tolist()) == {sample.teacher_id}, f"{name}: teacher"
        predicted = [int(t) for p, t in zip(places.tolist(), targets, strict=True) if ids[p] == number]
        assert predicted == [int(t) for t in sample.labels[1:] if t != IGNORE_INDEX], f"{name}: targets of {number}"
