"""The study in tiny form: every arm trains a step, one is looked at as all are, and the tables come of it."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from commands import RECORDS
from tiny import byte_tokenizer, tiny_model

from lightning_itk import cli

STUDY = Path(__file__).parents[2] / "benchmarks" / "study"
sys.path.insert(0, str(STUDY))

import arms  # noqa: E402
import table  # noqa: E402

SPEC = importlib.util.spec_from_file_location("study_run", STUDY / "run.py")  # the benchmarks have a run.py, too
runner = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(runner)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    model = tiny_model(
        "llama", num_hidden_layers=24, hidden_size=16, num_attention_heads=2, max_position_embeddings=512
    )
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    records = [{**record, "response": record["response"][:20]} for record in RECORDS]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sizes = {"train": 20, "test": 12, "choice": 4}
    study = runner.Study(folder / "model", folder / "data.jsonl", folder / "work", folder / "results", sizes)
    study.prepare()

    def command(*args: str) -> None:
        assert cli.main(list(args)) == 0

    study.command = command
    return study


def tiny(arm: arms.Arm) -> arms.Arm:
    return dataclasses.replace(arm, steps=1)


@pytest.mark.parametrize("arm", arms.ARMS, ids=lambda arm: arm.key)
def test_every_arm_trains(study, arm, tmp_path):
    config = study.config(tiny(arm), 0, tmp_path)
    study.with_config("fit", config, tmp_path)
    assert int((tmp_path / "tokens.txt").read_text()) > 0
    assert (tmp_path / "export" / "last" / "model.safetensors").exists()


def test_designs_differ():
    assert len({arm.key for arm in arms.ARMS}) == len(arms.ARMS)
    assert len({arm.design for arm in arms.ARMS}) == len({(str(a.model), a.student, a.records) for a in arms.ARMS})


def test_an_arm_from_its_run_to_its_table(study, tmp_path, monkeypatch):
    first, second = tiny(arms.ARMS[0]), tiny(arms.ARMS[1])
    for module in (runner, table):
        monkeypatch.setattr(module, "ARMS", (first, second))
    assert [(arm.name, seed) for arm, seed in study.unfinished([])][:3] == [("SFT", 0), ("KD", 0), ("SFT", 1)]
    for arm in (first, second):
        study.add(study.run(arm, 0))
    assert [(arm.name, seed) for arm, seed in study.unfinished([])][:2] == [("SFT", 1), ("KD", 1)]
    row = study.rows()[0]
    assert {
        "arm",
        "seed",
        "commit",
        "steps",
        "response_tokens",
        "seconds",
        "response_loss",
        "kl",
        "choice",
    } <= row.keys()
    assert row["steps"] == 1
    assert 0 <= row["choice"] <= 1
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold{table.END}\nafter\n")
    table.write(readme, study.results)
    text = readme.read_text()
    assert "old" not in text
    assert "| KD |" in text
    assert text.startswith("before")
    assert text.endswith("after\n")
    monkeypatch.setattr(runner, "ARMS", (dataclasses.replace(first, steps=2), second))
    assert [row["arm"] for row in study.rows()] == ["kd/KD"]  # a changed arm is another arm


def test_choices_hold_the_true_answer_first(study):
    rows = [json.loads(line) for line in (study.work / "choice.jsonl").read_text().splitlines()]
    test = [json.loads(line) for line in (study.work / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert [rows[4 * i]["response"] for i in range(4)] == [record["response"] for record in test[:4]]
    assert all(rows[4 * i + k]["instruction"] == test[i]["instruction"] for i in range(4) for k in range(4))


def test_the_readme_shows_what_was_measured():
    text = (STUDY / "README.md").read_text()
    _, _, rest = text.partition(table.BEGIN)
    assert rest.partition(table.END)[0].strip() == table.tables(STUDY / "results").strip()
