"""The commands end to end through `cli.main`: what they write, and one line for everything the user gets wrong."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import byte_tokenizer

from lightning_itk import cli, clusters, commands
from lightning_itk.chosen import scan
from lightning_itk.data import InstructionDataModule
from lightning_itk.scores import write_scores
from lightning_itk.sources import Source

RECORDS = [
    {"instruction": f"Frage {i} ä", "context": "", "response": "x" * (1 + i), "kind": "ab"[i % 2]} for i in range(40)
]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def refused(capsys, *args: str) -> str:
    """The one line on stderr of a command that must fail."""
    capsys.readouterr()
    assert cli.main(list(map(str, args))) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("lightning-itk: error: ")
    return line


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """data.jsonl with 40 records, and scores of all but two; record i has LP_app 1 - exp(-i / 40)."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + " \n" for r in RECORDS))
    record = np.array([i for i in range(40) if i not in (7, 8)])
    losses = np.stack([np.full(38, 2.0), 2.0 - record / 40])
    tokens = record + 2
    losses[:, 0], tokens[0] = np.nan, 0
    fingerprint = scan([Source(str(tmp_path / "data.jsonl"))]).fingerprint
    meta = {"fingerprint": fingerprint, "model": "opt-350m"}
    write_scores(tmp_path / "scores.parquet", record, tokens, losses, meta)
    return tmp_path


def select(folder: Path, *more: str) -> list[str]:
    return ["select", "--scores", f"{folder}/scores.parquet", "--data", f"{folder}/data.jsonl",
            "--output", f"{folder}/out/chosen.jsonl", *map(str, more)]  # fmt: skip


def test_fingerprint_is_the_data_modules(tmp_path):
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz")]
    Path(files[0]).write_text("".join(json.dumps(r) + "\n" for r in RECORDS[:9]))
    with gzip.open(files[1], "wt") as file:
        file.write("".join(json.dumps(r) + "\n" for r in RECORDS[9:]))
    data = InstructionDataModule(files, tokenizer=byte_tokenizer(), max_length=40, num_proc=1, cache_dir=str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    found = scan([Source(path) for path in files])
    assert (found.fingerprint, found.count, found.source) == (data.fingerprint, 40, [9, 31])


def test_select_writes_the_records_as_they_are(scored, capsys):
    assert cli.main(select(scored, "--fraction", 0.2)) == 0
    chosen = scored / "out" / "chosen.jsonl"
    original = (scored / "data.jsonl").read_text().splitlines()
    expected = [i for i in range(1, 40) if i not in (7, 8)][: round(0.2 * 37)]
    assert chosen.read_text().splitlines() == [original[i].strip() for i in expected]
    assert (scored / "out" / "chosen.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    for part in ("opt-350m", "40, scored 38", "1 dropped, 1 without response", "7, lowest lp_app", "longest responses"):
        assert part in said, said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--metric", "length", "--order", "highest", "--fraction", 0.1], [36, 37, 38, 39]),
        (["--clusters", "kind", "--fraction", 0.1], [1, 2, 3, 4]),
        (["--metric", "loss", "--fraction", 1], [i for i in range(1, 40) if i not in (7, 8)]),
    ],
)
def test_select_by(scored, options, expected):
    assert cli.main(select(scored, *options)) == 0
    assert [len(r["response"]) - 1 for r in lines(scored / "out" / "chosen.jsonl")] == expected


def test_select_random_depends_on_the_seed(scored):
    found = []
    for seed in (0, 0, 1):
        assert cli.main(select(scored, "--metric", "random", "--fraction", 0.5, "--seed", seed)) == 0
        found.append(lines(scored / "out" / "chosen.jsonl"))
    assert found[0] == found[1] != found[2]
    assert len(found[2]) == round(0.5 * 37)


@pytest.mark.parametrize("count", [3, 100])
def test_select_makes_clusters_and_keeps_them(scored, monkeypatch, count):
    pytest.importorskip("sklearn")
    texts: list[str] = []

    def embed(given, model, progress):
        texts.extend(given)
        return np.random.default_rng(0).normal(size=(len(given), 4)).astype(np.float32)

    monkeypatch.setattr(commands, "embed", embed)
    assert cli.main(select(scored, "--clusters", count, "--fraction", 0.3)) == 0
    assert len(texts) == 37
    assert texts[0] == clusters.cluster_text("Frage 1 ä", "xx")
    first = lines(scored / "out" / "chosen.jsonl")
    assert len(first) == round(0.3 * 37)
    kept = scored / "out" / "chosen.clusters.parquet"
    assert cli.main(select(scored, "--clusters", kept, "--fraction", 0.3)) == 0
    assert lines(scored / "out" / "chosen.jsonl") == first


def test_select_refuses(scored, capsys):
    other = scored / "other.jsonl"
    other.write_text("".join(json.dumps(r) + "\n" for r in reversed(RECORDS)))
    assert "made on other records or in another order" in refused(capsys, *select(scored, "--data", other))
    assert "no such scores file" in refused(capsys, *select(scored, "--scores", scored / "none.parquet"))
    assert "no such file" in refused(capsys, *select(scored, "--data", scored / "none.jsonl"))
    assert "fraction must be above 0" in refused(capsys, *select(scored, "--fraction", 0))
    assert "nothing is chosen" in refused(capsys, *select(scored, "--fraction", 0.001))
    assert "lp needs losses" in refused(capsys, *select(scored, "--metric", "lp"))
    assert "no column 'topic' to cluster by" in refused(capsys, *select(scored, "--clusters", "topic"))
    assert "is the data itself" in refused(capsys, *select(scored, "--output", scored / "data.jsonl"))
    assert "cannot be written" in refused(capsys, *select(scored, "--output", scored / "data.jsonl" / "x"))
    assert "not a Parquet file" in refused(capsys, *select(scored, "--scores", other))
    pq.write_table(pa.table({"record": [1, 2], "cluster": [0, 0]}), scored / "plain.parquet")
    assert "not a scores file" in refused(capsys, *select(scored, "--scores", scored / "plain.parquet"))
    clusters.write_clusters(scored / "theirs.parquet", [1, 2], [0, 0], "of other records")
    assert "made on other records" in refused(capsys, *select(scored, "--clusters", scored / "theirs.parquet"))
    assert "no such file" in refused(capsys, *select(scored, "--clusters", scored / "none.parquet"))
    assert "differ in columns or teacher" in refused(
        capsys, *select(scored, "--data", f'[{{"path": {scored}/data.jsonl, "teacher": "a"}}, {other}]')
    )
    other.write_text('{"instruction": "a", "response": 3}\n')
    assert "other.jsonl line 1: field 'response' is a number" in refused(capsys, *select(scored, "--data", other))
    assert not (scored / "out").exists()
    assert len(lines(scored / "data.jsonl")) == 40


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(5)))
    return tmp_path


def generate(model: str, folder: Path, *more: str) -> list[str]:
    return ["generate", "--model", model, "--prompts", f"{folder}/prompts.jsonl", "--output", f"{folder}/out.jsonl",
            "--max_new_tokens", "4", "--batch_size", "2", "--device", "cpu", *map(str, more)]  # fmt: skip


def test_generate(model_folder, prompts, capsys):
    model = model_folder("llama", 3, initializer_range=0.5)
    assert cli.main(generate(model, prompts, "--limit", "3", "--teacher", "big")) == 0
    made = lines(prompts / "out.jsonl")
    assert [r["prompt"] for r in made] == ["p0", "p1", "p2"]
    assert {r["teacher"] for r in made} == {"big"}
    assert "wrote 3 responses" in capsys.readouterr().out


def test_generate_refuses(model_folder, prompts, capsys):
    model = model_folder("llama", 3, initializer_range=0.5)
    assert "'none/x/y' does not exist" in refused(capsys, *generate("none/x/y", prompts))
    assert "no such file" in refused(capsys, *generate(model, prompts, "--prompts", "none.jsonl"))
    assert "limit must be at least 1" in refused(capsys, *generate(model, prompts, "--limit", 0))
    assert "temperature" in refused(capsys, *generate(model, prompts, "--temperature", -1))
    assert "more than the 128 positions" in refused(capsys, *generate(model, prompts, "--max_new_tokens", 127))
    assert "device 'abacus' cannot be used" in refused(capsys, *generate(model, prompts, "--device", "abacus"))
    assert "neither a Jinja template nor" in refused(capsys, *generate(model, prompts, "--chat_template", "none.jinja"))
    (prompts / "out.jsonl.partial").write_text('{"model": "another"}\n')
    assert "was begun with batch_size None, now it is 2" in refused(capsys, *generate(model, prompts))
    (prompts / "out.jsonl").write_text("")
    assert "out.jsonl: exists already" in refused(capsys, *generate(model, prompts))
    (prompts / "prompts.jsonl").write_text('{"response": "a"}\n')
    (prompts / "out.jsonl").unlink()
    assert "prompts.jsonl line 1: no prompt" in refused(capsys, *generate(model, prompts))
