import json
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tiny import QUIET, byte_tokenizer

from lightning_itk.batch import IGNORE_INDEX, count_targets, is_packed, model_inputs, real_tokens
from lightning_itk.data.cache import tokenize
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.loader import ResumableLoader, SampleSet, collate
from lightning_itk.data.sampler import BatchSampler
from lightning_itk.data.sources import Source


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> SampleSet:
    folder = tmp_path_factory.mktemp("samples")
    encoder = ChatEncoder(byte_tokenizer())
    tokenized = []
    for name, count in [("a", 20), ("b", 13)]:
        records = [
            {"prompt": "q" * (i % 7), "completion": "é" * (1 + i % 11), "teacher": f"t{i % 2}"} for i in range(count)
        ]
        records.insert(3, {"prompt": "q" * 500, "completion": "cut off"})
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        tokenized.append(tokenize(Source(str(path)), encoder, 100, cache_dir=folder, num_proc=1))
    return SampleSet(tokenized, [None, "expert"])


def test_sample_set(samples: SampleSet) -> None:
    assert len(samples) == 33
    assert samples.teachers == ("t0", "t1", "expert")
    ids = [i for i in range(35) if i not in (3, 24)]
    assert samples.sample_ids.tolist() == ids
    row = samples[np.array([0, 32])]
    assert [sample.sample_id for sample in row] == [0, 34]
    assert [samples.teachers[sample.teacher_id] for sample in row] == ["t0", "expert"]
    assert [len(sample.input_ids) for sample in row] == samples.lengths[[0, 32]].tolist()
    assert [(sample.labels != IGNORE_INDEX).sum() for sample in row] == samples.learned[[0, 32]].tolist()


@pytest.mark.parametrize("packing", [False, True])
def test_collate(samples: SampleSet, packing: bool) -> None:
    rows = (
        [samples[np.array([0, 1])], samples[np.array([2])]] if packing else [samples[np.array([i])] for i in range(3)]
    )
    batch = collate(rows, pad_id=7, teachers=samples.teachers, packing=packing)
    assert is_packed(batch) == packing
    assert set(batch["sample_ids"].unique().tolist()) - {-1} == {0, 1, 2}
    assert batch["teachers"] == samples.teachers
    assert (batch["input_ids"][~real_tokens(batch)] == 7).all()
    empty = collate([], pad_id=7, teachers=samples.teachers, packing=packing)
    assert count_targets(empty) == 0
    assert not real_tokens(empty).any()
    if not packing:
        assert model_inputs(empty)["attention_mask"].all()  # or attention would divide by 0


def loader(samples: SampleSet, num_workers: int = 0, **options: Any) -> ResumableLoader:
    return ResumableLoader(
        samples,
        BatchSampler(samples.lengths, **{"batch_size": 4, **options}),
        pad_id=0,
        packing=options.get("pack_to") is not None,
        num_workers=num_workers,
    )


def test_workers_and_random_numbers(samples: SampleSet) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    plain = list(loader(samples))
    parallel = list(loader(samples, num_workers=2))
    assert (torch.get_rng_state() == before).all()
    assert len(plain) == len(parallel) == len(loader(samples))
    for a, b in zip(plain, parallel, strict=True):
        assert a["input_ids"].equal(b["input_ids"])
        assert a["sample_ids"].equal(b["sample_ids"])
        assert a["teachers"] == b["teachers"]


def test_resumes_where_it_stood(samples: SampleSet) -> None:
    first = loader(samples)
    batches = iter(first)
    seen = [next(batches) for _ in range(3)]
    second = loader(samples)
    second.load_state_dict(first.state_dict())
    rest = list(second)
    whole = [batch["sample_ids"].tolist() for batch in loader(samples)]
    assert [batch["sample_ids"].tolist() for batch in [*seen, *rest]] == whole
    assert [batch["sample_ids"].tolist() for batch in second] == whole  # a position counts once


def test_another_plan_cannot_continue_an_epoch(samples: SampleSet) -> None:
    first = loader(samples)
    next(iter(first))
    other = loader(samples, batch_size=2)
    other.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="must have the same rows .4 and 2."):
        next(iter(other))
    other.load_state_dict(first.state_dict())
    other.sampler.set_epoch(1)
    assert len(list(other)) == len(other)  # from the next epoch on any plan will do


class Model(L.LightningModule):
    """Notes the samples it sees; its weights depend on their order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.seen: list[tuple[int, int, list[int]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        ids = batch["sample_ids"].unique()
        self.seen.append((self.current_epoch, batch_idx, ids.tolist()))
        return ((self.weight - ids.double().mean()) ** 2).sum() * 0.1

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Stop(Callback):
    """The end of a run that was killed after some batch: nothing after it counts."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_batch_end(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("killed")


def fit(
    folder: Path,
    samples: SampleSet,
    *,
    accumulate: int = 1,
    num_workers: int = 0,
    val: bool = True,
    stop: int | None = None,
    every: int | None = 1,
    resume: str | None = None,
    **options: Any,
) -> Model:
    model = Model()
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=-1)
    trainer = L.Trainer(
        **QUIET,
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        val_check_interval=2 if val else 1.0,
        callbacks=[checkpoint] + ([Stop(stop)] if stop else []),
        limit_val_batches=1 if val else 0,
    )
    loaders = [loader(samples, num_workers, accumulate=accumulate, **options)]
    loaders += [loader(samples, shuffle=False)] if val else []
    if stop:
        with pytest.raises(RuntimeError, match="killed"):
            trainer.fit(model, *loaders, ckpt_path=resume)
    else:
        trainer.fit(model, *loaders, ckpt_path=resume, weights_only=True)
    return model


def newest(folder: Path) -> str:
    return str(max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns))


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "num_workers", "pack_to", "val"),
    [
        (4, 1, 0, None, False),
        (4, 1, 0, None, True),
        (2, 3, 0, None, True),
        (2, 3, 0, 100, False),
        (4, 2, 2, None, False),
    ],
)
def test_lightning_resumes_with_the_same_batches(
    tmp_path: Path,
    samples: SampleSet,
    batch_size: int,
    accumulate: int,
    num_workers: int,
    pack_to: int | None,
    val: bool,
) -> None:
    options = {"batch_size": batch_size, "accumulate": accumulate, "pack_to": pack_to, "val": val}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = fit(tmp_path / "whole", samples, **options)
        epoch = len(whole.seen) // 3
        assert [epoch_ for epoch_, _, _ in whole.seen] == [0] * epoch + [1] * epoch + [2] * epoch
        orders = [[ids for e, _, ids in whole.seen if e == number] for number in range(3)]
        assert orders[0] != orders[1] != orders[2]
        for order in orders:
            assert sorted(i for ids in order for i in ids if i >= 0) == samples.sample_ids.tolist()
        # Within an epoch, at its last batch, in the first batches of the next, inside an accumulation window.
        stops = sorted({2, epoch - 1, epoch, epoch + 1, epoch + accumulate, 2 * epoch, 2 * epoch + 3, 3 * epoch - 1})
        for stop in stops[::3] if num_workers else stops:
            folder = tmp_path / f"stop-{stop}"
            killed = fit(folder, samples, stop=stop, num_workers=num_workers, **options)
            assert killed.seen == whole.seen[:stop]
            if not list(folder.glob("*.ckpt")):
                continue
            resumed = fit(folder, samples, resume=newest(folder), num_workers=num_workers, **options)
            assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :], stop
            lost = stop - (len(whole.seen) - len(resumed.seen))
            assert 0 < lost <= accumulate  # the last checkpoint is that of the last optimizer step
            assert resumed.weight.equal(whole.weight), stop


@pytest.mark.parametrize("val", [False, True])
def test_lightning_resumes_from_the_end_of_an_epoch(tmp_path: Path, samples: SampleSet, val: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = fit(tmp_path / "whole", samples, accumulate=2, val=val)
        epoch = len(whole.seen) // 3
        fit(tmp_path / "cut", samples, accumulate=2, val=val, every=None, stop=2 * epoch + 1)
        for path in (tmp_path / "cut").glob("*.ckpt"):
            resumed = fit(tmp_path / "cut", samples, accumulate=2, val=val, every=None, resume=str(path))
            assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :], path
            assert resumed.weight.equal(whole.weight), path


def test_a_position_in_a_plan_of_older_length_groups_is_refused(samples: SampleSet) -> None:
    """The plan is made anew when a run resumes, so it must be made by the same rule."""

    def loader(**options: Any) -> ResumableLoader:
        return ResumableLoader(samples, BatchSampler(samples.lengths, batch_size=2, **options), pad_id=0)

    for options in ({}, {"shuffle": False}, {"pack_to": 100}):  # only the first is grouped by length
        batches = iter(loader(**options))
        state = {"epoch": 0, "batches": 3, "plan": loader(**options).sampler.signature()}
        expected = [next(batches)["sample_ids"].tolist() for _ in range(4)][3]
        del state["plan"]["version of the length groups"]  # as it used to be
        resumed = loader(**options)
        resumed.load_state_dict(state)
        if options:
            assert next(iter(resumed))["sample_ids"].tolist() == expected
        else:
            with pytest.raises(ValueError, match=r"in the middle of an epoch with version of the length groups = None"):
                next(iter(resumed))
