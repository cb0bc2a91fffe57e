"""The study in tiny form: every arm trains a step, one is looked at as all are, and the tables come of it."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import RECORDS
from tiny import byte_tokenizer, tiny_model

from lightning_itk import cli

STUDY = Path(__file__).parents[2] / "benchmarks" / "study"
sys.path.insert(0, str(STUDY))

import arms  # noqa: E402
import car  # noqa: E402
import materials  # noqa: E402
import shop  # noqa: E402
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
    records, sizes = {"train": 20, "test": 12, "choice": 4}, {"pool": 15, "prompts": 6, "mixture": 20, "shop_test": 5}
    made = materials.Materials(folder / "model", folder / "data.jsonl", folder / "work", records, sizes)
    made.prepare()

    def command(*args: str) -> None:
        assert cli.main(list(args)) == 0

    made.command = command
    return runner.Study(made, folder / "results")


def tiny(arm: arms.Arm) -> arms.Arm:
    return dataclasses.replace(arm, steps=1)


@pytest.mark.parametrize("arm", arms.ARMS, ids=lambda arm: arm.key)
def test_every_arm_trains(study, arm, tmp_path):
    config = study.config(tiny(arm), 0, tmp_path)
    study.materials.with_config("fit", config, tmp_path)
    assert int((tmp_path / "tokens.txt").read_text()) > 0
    assert (tmp_path / "export" / "last" / "model.safetensors").exists()


def test_designs_differ():
    assert len({arm.key for arm in arms.ARMS}) == len(arms.ARMS)
    given = {(str(a.model), a.student, a.records, a.data, a.tokens_of) for a in arms.ARMS}
    assert len({arm.design for arm in arms.ARMS}) == len(given)


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
    rows = [json.loads(line) for line in (study.materials.work / "choice.jsonl").read_text().splitlines()]
    test = [json.loads(line) for line in (study.materials.work / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert [rows[4 * i]["response"] for i in range(4)] == [record["response"] for record in test[:4]]
    assert all(rows[4 * i + k]["instruction"] == test[i]["instruction"] for i in range(4) for k in range(4))


def test_equal_tokens_are_equal(study):
    longest, random = (study.materials.response_tokens(name, 0) for name in ("longest", "random"))
    arm = dataclasses.replace(next(a for a in arms.ARMS if a.name == "longest, equal tokens"), steps=1000)
    assert longest > random
    assert study.steps(arm, 0) * longest == pytest.approx(1000 * random, rel=0.01)


def test_thirds_of_the_pool(study):
    thirds = [study.materials.train(f"lp-135M-{third}", None, 0) for third in ("lowest", "middle", "highest")]
    lines = [set(Path(path).read_text().splitlines()) for path in thirds]
    assert [len(each) for each in lines] == [5, 5, 5]
    assert not lines[0] & lines[2]
    assert study.materials.train("random", None, 0) != study.materials.train("random", None, 1)


def test_an_arm_of_the_shop(study, tmp_path):
    arm = tiny(next(a for a in arms.ARMS if a.name == "DAE, 50 % shop"))
    row = study.run(arm, 0)
    assert 0 <= row["shop_exact_match"] <= 1
    found = {arm.key: [row]}
    assert "exact match in the shop" in table._table(found, study.results)


def test_sources_of_answers_are_ranked(study, monkeypatch):
    monkeypatch.setattr(
        "lightning_itk.selection.clusters.embed", lambda texts, *_: np.array([[1.0, len(text)] for text in texts])
    )
    car.rank(study.materials, study.results, "embedder")
    text = table._ranking(study.results / "car.json")
    assert all(name in text for name in arms.SOURCES.values())


def test_the_shop_answers_by_its_rules():
    for record in shop.shop_records(200, seed=1):
        sheet, answer = record["context"], record["response"]
        if record["instruction"].startswith("What does"):
            assert f"price {answer.split()[2]} euros" in sheet
        assert answer.endswith("Lindgren & Daughters")
    assert shop.shop_records(5, seed=1) == shop.shop_records(200, seed=1)[:5] != shop.shop_records(5, seed=2)


def test_the_readme_shows_what_was_measured():
    text = (STUDY / "README.md").read_text()
    _, _, rest = text.partition(table.BEGIN)
    assert rest.partition(table.END)[0].strip() == table.tables(STUDY / "results").strip()
