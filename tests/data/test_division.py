"""Which samples are trained on: of many worked out once, in files that all ranks of a machine map."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import byte_tokenizer

from lightning_itk.data import InstructionDataModule, division, loader
from lightning_itk.data.records import DataError
from lightning_itk.data.subset import Subset
from lightning_itk.selection.scores import write_scores


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in (("a", 60), ("b", 40)):
        rows = [{"prompt": f"{name}{i}", "completion": "x" * (1 + i % 30)} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def prepared(folder: Path, **options: Any) -> InstructionDataModule:
    files = [{"path": str(folder / f"{name}.jsonl"), "weight": weight} for name, weight in (("a", 1.0), ("b", 2.0))]
    options = {"train": files, "validation": 0.1, "max_length": 128, "num_proc": 1, **options}
    data = InstructionDataModule(tokenizer=byte_tokenizer(), cache_dir=str(folder / "cache"), **options)
    data.prepare_data()
    return data


def trained_on(data: InstructionDataModule) -> tuple[list[int], list[int], list[list[int]]]:
    data.setup("fit")
    batches = [np.concatenate(batch).tolist() for batch in data.train_dataloader().sampler]
    return data.train_sample_ids.tolist(), data._held_out.tolist(), batches


def write_losses(folder: Path, fingerprint: str, seed: int = 0) -> Subset:
    losses = np.stack([np.full(100, 2.0), np.random.default_rng(seed).random(100)])
    write_scores(folder / "scores.parquet", np.arange(100), np.ones(100), losses, {"fingerprint": fingerprint})
    return Subset(str(folder / "scores.parquet"), fraction=0.5)


@pytest.fixture
def expected(folder: Path) -> dict[str, Any]:
    """What is trained on, worked out in memory: with and without a subset, and with no share held out."""
    data = prepared(folder)
    found: dict[str, Any] = {"whole": trained_on(data), "none": trained_on(prepared(folder, validation=0))}
    found["subset"] = write_losses(folder, data.fingerprint)
    found["chosen"] = trained_on(prepared(folder, subset=found["subset"]))
    assert not list((folder / "cache").glob("*.columns"))
    return found


@pytest.fixture
def many(expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred samples are many from here on."""
    monkeypatch.setattr(loader, "_SHARED_SAMPLES", 30)


@pytest.mark.usefixtures("many")
def test_a_machine_works_it_out_once_and_its_ranks_map_it(folder: Path, expected: dict, monkeypatch) -> None:
    subset = expected["subset"]
    settings = {"whole": {}, "none": {"validation": 0}, "chosen": {"subset": subset}}
    made = {name: prepared(folder, **options) for name, options in settings.items()}
    monkeypatch.setattr(division, "choose", None)
    monkeypatch.setattr(division, "held_out", None)
    monkeypatch.setattr(division, "numbers", None)
    for name, data in made.items():
        assert trained_on(data) == expected[name]
        assert trained_on(prepared(folder, **settings[name])) == expected[name]  # a second start
        assert isinstance(data._chosen.base, np.memmap)
        assert all(source.samples.base is not None for source in data.train_dataloader().sampler.sources)  # no copies


@pytest.mark.usefixtures("many")
def test_other_scores_choose_other_samples(folder: Path, expected: dict) -> None:
    subset = expected["subset"]
    assert trained_on(prepared(folder, subset=subset)) == expected["chosen"]
    write_losses(folder, prepared(folder).fingerprint, seed=1)
    os.utime(subset.scores, (1, 1))
    other = trained_on(prepared(folder, subset=subset))
    assert other[:2] == expected["chosen"][:2]
    assert other[2] != expected["chosen"][2]
    subset.fraction = 0.25
    assert len(trained_on(prepared(folder, subset=subset))[2]) < len(other[2])


@pytest.mark.usefixtures("many")
def test_damaged_files_are_not_believed(folder: Path, expected: dict) -> None:
    data = prepared(folder)
    for damage in (lambda at: at.write_bytes(at.read_bytes()[:-4] + b"\xff" * 4), lambda at: at.write_bytes(b"?")):
        for path in (folder / "cache").glob("*.columns/pool.npy"):
            damage(path)
        assert trained_on(data) == expected["whole"]


@pytest.mark.usefixtures("many")
def test_what_is_wrong_with_a_subset_is_said_to_runs_that_train(folder: Path) -> None:
    data = prepared(folder, subset=Subset(str(folder / "none.parquet")))
    data.setup("validate")
    with pytest.raises(DataError, match="no such scores file"):
        data.setup("fit")


@pytest.mark.usefixtures("many")
def test_setup_and_plan_read_no_token(folder: Path, expected: dict) -> None:
    data = prepared(folder, packing=True)
    data.setup("fit")
    plan = [np.concatenate(batch).tolist() for batch in data.train_dataloader().sampler]
    for path in (folder / "cache").glob("*/samples.arrow"):
        path.write_bytes(bytes(path.stat().st_size))  # all of them gone
    for source in (folder / "a.jsonl", folder / "b.jsonl"):
        shutil.copystat(source, source)
    again = prepared(folder, packing=True)
    again.setup("fit")
    assert [np.concatenate(batch).tolist() for batch in again.train_dataloader().sampler] == plan
