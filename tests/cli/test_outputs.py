"""Every command refuses, before it works, to write over what it did not write."""

import json

import lightning as L
import pytest
from commands import choose, generate, lines, refused, responses, select
from tiny import byte_tokenizer, tiny_model

import lightning_itk as itk
from lightning_itk import cli
from lightning_itk.callbacks import ResponseWriter
from lightning_itk.cli import choose_teacher as choose_command
from lightning_itk.cli import generate as generate_command
from lightning_itk.cli import select as select_command
from lightning_itk.recorder import ResponseLossRecorder
from lightning_itk.selection.scores import read_scores
from lightning_itk.toy.quickstart import claim

OVERWRITE = ("--overwrite", "true")


@pytest.mark.parametrize("name", ["chosen.jsonl", "chosen.png", "chosen.clusters.parquet"])
def test_select(scored, capsys, monkeypatch, name):
    theirs = scored / "out" / name
    theirs.parent.mkdir()
    theirs.write_text("theirs")
    monkeypatch.setattr(select_command, "read_meta", lambda path: pytest.fail("worked"))
    clusters = ("--clusters", "3") if "clusters" in name else ()
    assert f"{name}: exists already" in refused(capsys, *select(scored, *clusters))
    assert f"{name}: no run of this kit wrote it" in refused(capsys, *select(scored, *clusters, *OVERWRITE))
    assert theirs.read_text() == "theirs"
    monkeypatch.undo()
    theirs.unlink()
    assert cli.main(select(scored)) == 0
    assert cli.main(select(scored, *OVERWRITE, "--fraction", "0.5")) == 0
    assert "is the name of the picture" in refused(capsys, *select(scored, "--output", scored / "out" / "a.png"))


def test_generate(model_folder, prompts, capsys, monkeypatch):
    model, output = model_folder("llama", 3, initializer_range=0.5), prompts / "out.jsonl"
    assert cli.main(generate(model, prompts, "--limit", 2)) == 0
    assert cli.main(generate(model, prompts, "--limit", 3, *OVERWRITE)) == 0
    assert len(lines(output)) == 3
    output.write_text("".join(json.dumps({**record, "reward": 1}) + "\n" for record in lines(output)))  # by its user
    monkeypatch.setattr(generate_command, "load_causal_lm", lambda *_, **__: pytest.fail("worked"))
    assert "out.jsonl: no run of this kit wrote it, or" in refused(capsys, *generate(model, prompts, *OVERWRITE))
    given = prompts / "prompts.jsonl"
    assert "is the data itself" in refused(capsys, *generate(model, prompts, "--output", given, *OVERWRITE))
    monkeypatch.undo()
    output.unlink()
    (prompts / "out.jsonl.partial").write_text("notes without an end of line")
    assert "is no unfinished output of this command" in refused(capsys, *generate(model, prompts))
    assert (prompts / "out.jsonl.partial").read_text() == "notes without an end of line"


def test_choose_teacher(model_folder, tmp_path, capsys, monkeypatch):
    student, table = model_folder("llama", 3, initializer_range=0.5), tmp_path / "table.json"
    files = {name: responses(tmp_path / f"{name}.jsonl", ["ab", "cde"], [1, 2]) for name in "ab"}
    command = choose(student, "--output", table, *OVERWRITE, **files)
    assert cli.main(command) == cli.main(command) == 0
    table.write_text("{}")
    monkeypatch.setattr(choose_command, "load_causal_lm", lambda *_, **__: pytest.fail("worked"))
    assert "table.json: no run of this kit wrote it" in refused(capsys, *command)
    assert "is the data itself" in refused(capsys, *choose(student, "--output", files["a"], *OVERWRITE, **files))
    assert table.read_text() == "{}"


def trainer(*callbacks, **options) -> L.Trainer:
    options |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), enable_model_summary=False, **options)


@pytest.fixture
def data(prompts):
    train = prompts / "train.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"p{i}", "response": "ab"}) + "\n" for i in range(4)))
    options = {"validation": 0, "tokenizer": byte_tokenizer(), "batch_size": 4, "num_proc": 1, "cache_dir": prompts}
    return itk.InstructionDataModule(str(train), predict=str(prompts / "prompts.jsonl"), **options)


@pytest.mark.filterwarnings("ignore")
def test_predicted_responses(data, tmp_path, monkeypatch):
    module, output = itk.SFTModule(tiny_model("llama", 0), max_new_tokens=2), tmp_path / "answers.jsonl"

    def predict(overwrite=False):
        trainer(ResponseWriter(str(output), overwrite)).predict(module, datamodule=data, return_predictions=False)
        return lines(output)

    assert [answer["record"] for answer in predict()] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"answers\.jsonl: exists already"):
        predict()
    with monkeypatch.context() as patch:
        patch.setattr(ResponseWriter, "on_predict_batch_end", lambda *_: {}["broken off"])
        with pytest.raises(KeyError):
            predict(overwrite=True)
    assert lines(output) == []
    assert len(predict(overwrite=True)) == 5
    output.write_text("theirs")
    with pytest.raises(ValueError, match="no run of this kit wrote it"):
        predict(overwrite=True)
    assert output.read_text() == "theirs"


@pytest.mark.filterwarnings("ignore")
def test_recorded_scores(data, tmp_path):
    file = tmp_path / "scores.parquet"

    def record(overwrite=False):
        recorder = ResponseLossRecorder(str(file), overwrite=overwrite)
        trainer(recorder, max_epochs=1).fit(itk.SFTModule(tiny_model("llama", 0)), datamodule=data)
        return read_scores(file).epochs

    assert record() == 1
    with pytest.raises(ValueError, match=r"scores\.parquet: exists already"):
        record()
    assert record(overwrite=True) == 1
    file.write_text("theirs")
    with pytest.raises(ValueError, match=r"scores\.parquet: not a Parquet file"):
        record(overwrite=True)
    assert file.read_text() == "theirs"


def test_quickstart(tmp_path):
    folder = tmp_path / "runs" / "quickstart"
    claim(folder)
    with pytest.raises(ValueError, match="exists already; --overwrite true replaces an earlier quickstart"):
        claim(folder)
    claim(folder, overwrite=True)
    (tmp_path / "notes.txt").write_text("theirs")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which no quickstart wrote"):
        claim(tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"notes\.txt: is a file"):
        claim(tmp_path / "notes.txt")
