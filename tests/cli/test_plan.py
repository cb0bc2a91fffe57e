"""`plan`: the figures of a configuration, its verdict, and what makes it fit."""

import json

import pytest
from commands import refused

from lightning_itk import cli
from lightning_itk.planning import devices

TRAINER = "trainer: {precision: %s, strategy: %s, devices: %s, accumulate_grad_batches: 2}\n"
DATA = "data: {train: %s, max_length: 64, batch_size: 4}\n"


@pytest.fixture
def configured(model_folder, tmp_path):
    """`configured(method, …)` -> the file of a configuration with tiny models and two records."""
    student, teacher = (model_folder("llama", seed) for seed in (0, 1))
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "bcd"}\n' * 2)

    def make(method="SFT", precision="bf16-mixed", strategy="auto", devices=1, **more):
        args = {"student": student, **more}
        if method == "KD":
            args["teacher"] = teacher
        if method == "DAE":
            args["teachers"] = {"one": teacher, "two": student}
        model = f"model: {{class_path: lightning_itk.{method}Module, init_args: {json.dumps(args)}}}\n"
        path = tmp_path / "run.yaml"
        path.write_text(TRAINER % (precision, strategy, devices) + model + DATA % (tmp_path / "data.jsonl"))
        return str(path)

    return make


def planned(config, tmp_path, *more):
    output = tmp_path / "plan.json"
    output.unlink(missing_ok=True)
    assert cli.main(["plan", "--config", config, "--output", str(output), *more]) == 0
    return json.loads(output.read_text())


def test_figures_and_verdict(configured, tmp_path, capsys):
    found = planned(configured("KD", attention={"layers": "every:2"}), tmp_path)
    assert sum(found["parts"].values()) == pytest.approx(found["peak_bytes"], abs=10)
    assert found["parts"]["teacher"] > 0
    assert found["parts"]["optimizer"] == pytest.approx(2 * found["parts"]["weights"], rel=0.01)
    assert found["fits"]
    assert found["suggestions"] == []
    assert found["cache_bytes"] == 2 * 8 * 32  # bf16; of each record three bytes and a stop token; hidden states of 32
    printed = capsys.readouterr().out
    assert "fits: " in printed
    assert "40% of 989 TFLOP/s" in printed
    assert "every rank loads every model whole" in printed


@pytest.mark.parametrize("method", ["SFT", "DAE"])
def test_packed_rows_and_other_devices(configured, tmp_path, method):
    one, two = (
        planned(configured(method), tmp_path, "--data.packing", packing, "--device", kind)
        for packing, kind in (("true", "mi300x"), ("false", "cpu"))
    )
    assert one["flops"] == pytest.approx(two["flops"], rel=0.05)
    assert one["seconds"] < two["seconds"]


def test_more_ranks(configured, tmp_path):
    alone = planned(configured(), tmp_path)["parts"]
    copies = planned(configured(), tmp_path, "--devices", "4", "--nodes", "2")
    sharded = configured(strategy="{class_path: lightning.pytorch.strategies.ModelParallelStrategy}", devices=2)
    shards = planned(sharded, tmp_path)
    parts = shards["parts"]
    assert shards["host_bytes"] == pytest.approx(copies["host_bytes"] / 2, abs=1)
    assert (copies["ranks"], copies["strategy"]) == (8, "ddp")
    assert copies["parts"]["gradients"] - alone["gradients"] == pytest.approx(alone["weights"], rel=0.01)
    assert parts["optimizer"] == pytest.approx(alone["optimizer"] / 2, rel=0.01)


def test_every_suggestion_fits(configured, tmp_path, monkeypatch, capsys):
    config = configured("KD", attention=None)
    peak = planned(config, tmp_path)["peak_bytes"] / 2**30
    small = devices.DEVICES["l40s"]._replace(memory=0.85 * peak)
    monkeypatch.setitem(devices.DEVICES, "l40s", small)
    found = planned(config, tmp_path, "--device", "l40s")
    assert not found["fits"]
    changes = " ".join(each["change"] for each in found["suggestions"])
    assert "sharded over 2" in changes
    assert "accumulate_grad_batches: 8" in changes
    assert all(each["peak_bytes"] <= devices.SPARE * small.memory * 2**30 for each in found["suggestions"])
    assert "does not fit" in capsys.readouterr().out


def test_help_names_its_own_options(capsys):
    assert cli.main(["plan", "--help"]) == 0
    assert "--response_share" in capsys.readouterr().out


def test_bad_input_is_one_line(configured, tmp_path, capsys):
    config = configured()
    assert "device 'h99' is not known, expected h100" in refused(capsys, "plan", "--config", config, "--device", "h99")
    gone = ("--model.init_args.student", "no-such-model")
    assert "no config.json of 'no-such-model'" in refused(capsys, "plan", "--config", config, *gone)
    assert "devices is 0" in refused(capsys, "plan", "--config", config, "--devices", "0")
    assert "response_share is 2" in refused(capsys, "plan", "--config", config, "--response_share", "2")
    (tmp_path / "mine.json").write_text("mine")
    assert "exists already" in refused(capsys, "plan", "--config", config, "--output", tmp_path / "mine.json")
    assert "cannot be simulated" in refused(capsys, "plan", "--config", configured(strategy="deepspeed"))
    assert "plan knows" in refused(capsys, "plan", "--config", configured(precision="64-true"))
