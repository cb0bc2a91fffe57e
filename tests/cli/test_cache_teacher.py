"""`cache-teacher` and `fit` through the command line: one configuration, then the folder in the teacher's place."""

import json
import os
import sys
from pathlib import Path

import pytest
from caching import WIDE, hashes, write_data
from commands import refused
from processes import run_ranks

from lightning_itk import cli
from lightning_itk.cached.manifest import Manifest
from lightning_itk.methods import sharding

QUIET = {"accelerator": "cpu", "max_steps": 2, "enable_progress_bar": False, "limit_val_batches": 0, "devices": 1}


@pytest.fixture
def config(model_folder, tmp_path, monkeypatch):
    """`config(model keys, teacher(s))` -> a YAML file; JSON is YAML."""
    monkeypatch.chdir(tmp_path)
    data = {"train": write_data(tmp_path), "max_length": 48, "batch_size": 4, "num_proc": 1, "cache_dir": "cache"}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}

    def write(method: str = "KDModule", **model) -> str:
        init = {"student": model_folder("llama", 0), **model}
        if not {"teacher", "teachers"} & model.keys() and method != "SFTModule":
            init["teacher"] = model_folder("llama", 1, **WIDE)
        whole = {"trainer": {**QUIET, "callbacks": [callback]}, "data": data, "seed_everything": 0}
        whole["model"] = {"class_path": f"lightning_itk.{method}", "init_args": init}
        Path("kd.yaml").write_text(json.dumps(whole))
        return "kd.yaml"

    return write


def cache(config: str, *more: str) -> list[str]:
    return ["cache-teacher", "--config", config, "--output", "cached", *map(str, more)]


def planned(config: str, *more: str) -> dict:
    assert cli.main(["plan", "--config", config, *more, "--output", "plan.json", "--overwrite", "true"]) == 0
    return json.loads(Path("plan.json").read_text())


def test_a_folder_takes_the_teachers_place(config, capsys, caplog):
    file = config(attention={"weight": 0.5, "layers": {0: 1, 1: 3}})
    assert cli.main(cache(file, "--attention", "true")) == 0
    assert "192 bytes for each of 370 response tokens" in caplog.text  # 48 states in fp32
    assert "576 for each of" in caplog.text  # q [8, 6] and k [4, 6] of two layers
    assert "wrote cached: 25 samples" in capsys.readouterr().out
    assert not Path("runs").exists()
    manifest = Manifest.read("cached")
    assert manifest.settings["layers"] == [1, 3]
    assert cli.main(cache(file, "--attention", "true")) == 0
    assert "is complete and undamaged" in capsys.readouterr().out
    assert cli.main(["fit", "--config", file, "--model.init_args.teacher", "cached"]) == 0
    printed = capsys.readouterr().out
    assert "cached teacher" in printed
    assert "simulated; there" in " ".join(printed.split())
    live, stored = (
        planned(file, "--model.init_args.teacher", teacher)
        for teacher in (json.loads(Path(file).read_text())["model"]["init_args"]["teacher"], "cached")
    )
    assert 0 < stored["parts"]["teacher"] < live["parts"]["teacher"]
    assert "was begun with layers [1, 3], now it is []" in refused(capsys, *cache(file))
    assert cli.main(cache(file, "--overwrite", "true")) == 0
    assert "not stored (--attention true)" in capsys.readouterr().out
    line = refused(capsys, "fit", "--config", file, "--model.init_args.teacher", "cached")
    assert "holds no queries and keys of teacher layers [1, 3], but none" in line


def test_dae_has_a_folder_for_each_teacher(config, model_folder, capsys):
    teachers = {"general": model_folder("llama", 1, **WIDE), "expert": model_folder("llama", 2)}
    file = config("DAEModule", teachers=teachers)
    assert cli.main(cache(file, "--only", "expert")) == 0
    assert [path.name for path in Path("cached").iterdir()] == ["expert"]
    assert cli.main(["fit", "--config", file, "--model.init_args.teachers.expert", "cached/expert"]) == 0
    assert cli.main(cache(file)) == 0
    samples = [Manifest.read(f"cached/{name}").samples for name in teachers]
    assert samples == [16, 9]
    both = {name: f"cached/{name}" for name in teachers}
    assert cli.main(["fit", "--config", config("DAEModule", teachers=both)]) == 0
    swapped = {"general": "cached/expert", "expert": "cached/general"}
    line = refused(capsys, "fit", "--config", config("DAEModule", teachers=swapped))
    assert "cached/expert: lacks 1" in line


def test_top_k_prints_its_gap_and_serves_one_temperature(config, capsys, caplog):
    file = config(temperature=2.0, teacher_dtype="bfloat16")
    mixed = ["--trainer.precision", "bf16-mixed"]
    assert cli.main(cache(file, "--mode", "topk", "--k", 16, *mixed)) == 0
    said = capsys.readouterr().out
    assert "70 bytes for each of" in caplog.text  # 16 ids, 17 log-probabilities, the loss
    assert "top 16 against all tokens, on 370 response tokens of " in said
    assert "per token" in said
    fit = ["fit", "--config", file, "--model.init_args.teacher", "cached", *mixed]
    assert cli.main(fit) == 0
    assert cli.main(["validate", *fit[1:], "--trainer.limit_val_batches", "1"]) == 0
    assert "at temperature 2, temperature is 1" in refused(capsys, *fit, "--model.init_args.temperature", "1.0")
    Path("own.py").write_text(
        "import lightning_itk as itk\nclass Own(itk.KDModule):\n    def divergence(self, *rows):\n        return 0\n"
    )
    line = refused(capsys, *fit, "--model.class_path", "own.Own")
    assert "Own has a divergence of its own, which needs its states" in line
    assert "k is 300, expected 1 to 299" in refused(capsys, *cache(file, "--mode", "topk", "--k", 300))


def test_its_help_is_its_own(capsys):
    assert cli.main(["cache-teacher", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--mode {states,topk}" in said
    assert "write a folder that takes their place" in " ".join(said.split())


def test_what_cannot_be_is_one_line(config, model_folder, capsys):
    file = config()
    assert "output is null" in refused(capsys, "cache-teacher", "--config", file)
    assert "has no teacher by name" in refused(capsys, *cache(config("SFTModule")))
    assert "attention is true, but" in refused(capsys, *cache(config(), "--attention", "true"))
    assert "mode topk stores no queries and keys" in refused(
        capsys, *cache(config(attention={"layers": {0: 1}}), "--attention", "true", "--mode", "topk")
    )
    Path("cached").mkdir()
    Path("cached/notes.txt").write_text("theirs")
    assert "cached: holds notes.txt, which no cache-teacher wrote" in refused(capsys, *cache(config()))
    dae = config("DAEModule", teachers={"a/b": model_folder("llama", 1)})
    assert "teacher 'a/b': its name cannot be that of a folder" in refused(capsys, *cache(dae))
    dae = config("DAEModule", teachers={"a": model_folder("llama", 1)})
    assert "only is 'b', expected one of 'a'" in refused(capsys, *cache(dae, "--only", "b"))


@pytest.mark.process
def test_two_ranks_of_the_command_write_the_bytes_of_one(config, tmp_path):
    file = config()
    assert cli.main(cache(file)) == 0
    run_ranks(_main, cache(file, "--output", "two", "--trainer.strategy", "ddp", "--trainer.devices", "2"), tmp_path)
    assert hashes(tmp_path / "two") == hashes(tmp_path / "cached")


@pytest.mark.process
def test_two_ranks_of_fsdp2_read_their_own_rows(config, tmp_path):
    """The folder is the one of a whole teacher, its hash too; `fit` reads student and teacher in the same way."""
    file = config(attention={"weight": 0.5, "layers": {0: 1, 1: 3}})
    assert cli.main(cache(file, "--attention", "true")) == 0
    kind = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}
    kind["init_args"] = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    sharded = ["--trainer.strategy", json.dumps(kind), "--trainer.devices", "2"]
    commands = [cache(file, "--attention", "true", "--output", "two", *sharded), ["fit", "--config", file, *sharded]]
    run_ranks(_counted, commands, tmp_path)
    assert Manifest.read("two").settings == Manifest.read("cached").settings
    assert hashes(tmp_path / "two") == hashes(tmp_path / "cached")


def _counted(commands: list[list[str]], folder: Path) -> None:
    os.chdir(folder)
    read, own = [], sharding.read_weights
    sharding.read_weights = lambda *args: read.append(own(*args)) or read[-1]
    assert [cli.main(command) for command in commands] == [0, 0]
    assert read == [True, True, True]


def _main(args: list[str], folder: Path) -> None:
    os.chdir(folder)
    sys.exit(cli.main(args))
