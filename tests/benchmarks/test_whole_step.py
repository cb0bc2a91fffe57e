"""Whole runs: loops take turns, and one gets numbers only where it trained on what it was given, and rightly."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import loops  # noqa: E402
import run  # noqa: E402
import whole_step  # noqa: E402
from job import Example, Job, read_examples, write_examples  # noqa: E402
from providers import named  # noqa: E402
from settings import Settings  # noqa: E402


@pytest.fixture
def rows_of(monkeypatch):
    """`rows_of(key=loop, …)` -> the row of each, of tiny runs in one precision."""

    def rows(precision="32-true", method="sft", settings=None, **made) -> dict[str, dict]:
        monkeypatch.setattr(whole_step, "require", lambda key: None)
        monkeypatch.setattr(whole_step, "METHODS", {method: tuple(made)})
        monkeypatch.setattr(whole_step, "RUNS", {"tiny": ((method, precision),)})
        for key, loop in made.items():
            monkeypatch.setitem(loops.LOOPS, key, loop)
        settings = settings or Settings(tiny=True)
        whole_step.run(settings)
        return {named(row["provider"]).key: row for row in settings.rows}

    return rows


@pytest.fixture
def job(tmp_path):
    """A tiny run of the kit."""
    models = whole_step.Models.of(Settings(tiny=True))
    write_examples(tmp_path / "examples.npz", whole_step.made_up(12, whole_step.TINY, models.vocab))
    return whole_step.planned("lightning", "sft", "32-true", models, whole_step.TINY, tmp_path, "cpu").job


def by_hand(job, watch, student, examples, loss_of):
    """A loop of our own around `loss_of(student, example, window)`, which gives a sample's share of the step's loss."""
    optimizer, window, first = watch.optimizer(student.parameters()), job.batch * job.accumulate, 0.0
    for start in range(0, len(examples), window):
        step = examples[start : start + window]
        for example in step:
            loss = loss_of(student, example, step)
            loss.backward()
            first += loss.item() if start == 0 else 0.0
        optimizer.step()
        optimizer.zero_grad()
    return first


def mean_loss(student, example):
    return student(torch.from_numpy(example.ids)[None], labels=torch.from_numpy(example.labels())[None]).loss


def test_examples_come_back_from_their_file(tmp_path):
    examples = whole_step.made_up(5, whole_step.TINY, 300)
    assert len({len(e.ids) for e in examples}) > 1
    write_examples(tmp_path / "examples.npz", examples)
    for one, other in zip(examples, read_examples(str(tmp_path / "examples.npz")), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert 0 < one.start == other.start < len(one.ids)


def test_what_trains_on_something_else_gets_no_number(rows_of):
    def shorter(job, watch, student, teacher, examples):
        return loops.hf_trainer(job, watch, student, teacher, [Example(e.ids[:-1], e.start) for e in examples])

    def mean_of_means(job, watch, student, teacher, examples):
        """What trainers did before they counted tokens over all of a step's micro-batches."""
        job = dataclasses.replace(job, batch=1, accumulate=job.batch * job.accumulate)
        watch.job = job
        return by_hand(job, watch, student, examples, lambda model, e, step: mean_loss(model, e) / len(step))

    rows = rows_of(lightning=loops.lightning, **{"hf-trainer": shorter, "trl-sft": mean_of_means})
    assert rows["lightning"]["status"] == "ok"
    for key, said in (("hf-trainer", "tokens of its steps"), ("trl-sft", "loss ")):
        assert rows[key]["status"] == "wrong"
        assert rows[key]["reason"].startswith(said)
        assert "ms" not in rows[key]


def test_a_wrong_gradient_of_a_right_loss_gets_no_number(rows_of):
    def half(job, watch, student, teacher, examples):
        def loss(model, example, step):
            count = sum(len(e.ids) - e.start for e in step)
            value = mean_loss(model, example) * (len(example.ids) - example.start) / count
            return value if example is step[0] else value.detach() + 0 * value  # only the first sample's gradient

        watch.job = dataclasses.replace(job, batch=1, accumulate=job.batch * job.accumulate)
        return by_hand(watch.job, watch, student, examples, loss)

    row = rows_of(lightning=half)["lightning"]
    assert row["status"] == "wrong"
    assert row["reason"].startswith("gradient_error")


def test_what_is_told_bf16_and_computes_in_fp32_is_not_compared(rows_of):
    def deaf(job, *rest):
        return loops.lightning(dataclasses.replace(job, precision="32-true"), *rest)

    row = rows_of("bf16-mixed", lightning=deaf)["lightning"]
    assert row["status"] == "not available"
    assert "fp32" in row["reason"]


def test_loops_take_turns_until_the_time_is_over(rows_of, monkeypatch):
    turns = []

    def carried_out(job, folder, apart):
        turns.append(job.provider)
        np.ones(3).tofile(job.gradient)
        tokens = [sum(len(e.ids) for e in read_examples(job.samples)[i : i + 4]) for i in range(0, 12, 4)]
        return {
            "ms": [float(len(turns))], "wall_ms": [1.0], "tokens": tokens, "positions": tokens, "peak_mib": 1.0,
            "before_mib": 1.0, "start_s": 1.0, "autocast": False, "loss": 2.0,
        }  # fmt: skip

    monkeypatch.setattr(whole_step, "carry_out", carried_out)
    monkeypatch.setattr(whole_step, "TINY", whole_step.TINY._replace(rounds=3))
    three = {"lightning": None, "hf-trainer": None, "trl-sft": None}
    rows = rows_of(**three)
    assert turns == ["reference", *three, *three, *three]
    assert [row["rounds"] for row in rows.values()] == [3, 3, 3]
    assert [row["ms"] for row in rows.values()] == [5.0, 6.0, 7.0]  # the median over the rounds
    turns.clear()
    late = rows_of(settings=Settings(tiny=True, deadline=time.monotonic() - 1), **three)
    assert not turns
    assert {row["status"] for row in late.values()} == {"skipped"}


def test_a_folder_and_records_of_the_user(model_folder, tmp_path):
    records = tmp_path / "records.jsonl"
    lines = [{"instruction": "Say it", "output": "it " * n} for n in (1, 2, 3)]
    records.write_text("\n".join(map(json.dumps, lines)))
    models = whole_step.Models.of(Settings(tiny=True, model=model_folder()))
    layers = json.loads(Path(model_folder(), "config.json").read_text())["num_hidden_layers"]
    assert models.teacher == {"folder": model_folder()}
    assert 0 < models.student["layers"] <= layers
    examples = whole_step.from_records(str(records), model_folder(), 5, 200)
    assert len(examples) == 5
    assert len({bytes(e.ids) for e in examples}) == 3  # again from the start
    assert all(0 < e.start < len(e.ids) for e in examples)
    said = [{"role": role, "content": "Well"} for role in ("user", "assistant") * 2]
    records.write_text(json.dumps({"messages": said}))
    with pytest.raises(ValueError, match="no record of one prompt"):
        whole_step.from_records(str(records), model_folder(), 5, 200)


def test_what_the_command_line_refuses(tmp_path, capsys):
    for wrong, said in (
        (["--model", str(tmp_path)], "no config.json"),
        (["--data", "records.jsonl"], "give --model"),
        (["--model", "whole", "--student", "folder"], "give --model"),
    ):
        with pytest.raises(SystemExit):
            run.main(["--tiny", *wrong])
        assert said in capsys.readouterr().err


@pytest.mark.process
def test_a_process_of_its_own(job: Job, tmp_path):
    here = loops.run(job)
    found = whole_step.carry_out(job, tmp_path, True)
    assert found["loss"] == here["loss"]
    assert found["tokens"] == here["tokens"]
    assert 100 < found["before_mib"] <= found["peak_mib"]
    with pytest.raises(RuntimeError, match="its process ended with 1: KeyError: 'nobody'"):
        whole_step.carry_out(dataclasses.replace(job, provider="nobody"), tmp_path, True)
