"""Commands on data that one file, or one machine, does not hold."""

import gzip
import json
import os
import shutil

import fsspec
import pytest
from commands import RECORDS, refused, select

from lightning_itk import cli
from lightning_itk.data import cache


def test_select_reads_a_folder_elsewhere_as_the_one_file_that_was_scored(scored):
    written = (scored / "data.jsonl").read_bytes().splitlines(keepends=True)
    system = fsspec.filesystem("memory")
    system.pipe(
        {"/select/0.jsonl": b"".join(written[:30]), "/select/1.jsonl.gz": gzip.compress(b"".join(written[30:]))}
    )
    found = []
    for data in (scored / "data.jsonl", "memory://select", "memory://select/[01].*"):
        assert cli.main(select(scored, "--data", data, "--fraction", 0.5, "--overwrite", "true")) == 0
        found.append((scored / "out" / "chosen.jsonl").read_bytes())
    assert found[0] == found[1] == found[2]
    system.rm("/select", recursive=True)


@pytest.fixture
def config(tmp_path, model_folder):
    """A configuration of fit whose devices this machine does not have, nor its model's weights."""
    bare = tmp_path / "model"
    shutil.copytree(model_folder(), bare, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, records in (("a", RECORDS[:20]), ("b", RECORDS[20:])):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "asked.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    data = {"train": f"{tmp_path}/data", "validation": 0.1, "predict": f"{tmp_path}/asked.jsonl", "max_length": 300}
    model = {"class_path": "lightning_itk.SFTModule", "init_args": {"student": str(bare)}}
    trainer = {"accelerator": "cuda", "devices": 512, "strategy": "fsdp"}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"data": data | {"cache_dir": f"{tmp_path}/cache"}, "model": model, "trainer": trainer}))
    return path


def test_tokenize_fills_the_caches_that_fit_reads(config, model_folder, capsys, monkeypatch):
    for shard, said in (
        ("1/2", "tokenized shard 1/2: 0 of 2 caches are complete; data, asked.jsonl still without shard 0/2"),
        ("0/2", "tokenized shard 0/2: 2 of 2 caches are complete"),
        ("0/2", "tokenized shard 0/2: 2 of 2 caches are complete"),
    ):
        assert cli.main(["tokenize", "--config", str(config), "--shard", shard]) == 0
        assert capsys.readouterr().out.strip() == said
    made = sorted(path.name for path in (config.parent / "cache").iterdir() if path.name != "hashes")
    assert len(made) == 2
    assert cli.main(["tokenize", "--config", str(config)]) == 0
    assert sorted(path.name for path in (config.parent / "cache").iterdir() if path.name != "hashes") == made
    monkeypatch.setattr(cache, "_build", None)
    monkeypatch.chdir(config.parent)
    here = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    here += ["--model.init_args.student", model_folder()]
    fit = ["--trainer.max_steps", "1", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
    assert cli.main(["fit", "--config", str(config), *here, *fit]) == 0
    assert os.listdir(config.parent / "cache")


def test_tokenize_refuses_in_one_line(config, capsys):
    line = refused(capsys, "tokenize", "--config", config, "--shard", "2/2")
    assert "shard is '2/2', expected i/n with i from 0 to n-1" in line
    line = refused(capsys, "tokenize", "--config", config, "--data.train", "nowhere://a/*.jsonl")
    assert "nowhere://a/*.jsonl: cannot be looked at: Protocol not known: nowhere" in line
    assert cli.main(["tokenize", "--help"]) == 0
    assert "--shard" in capsys.readouterr().out
