import gzip
import json
import logging
import os
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from jsonargparse import ArgumentParser
from tiny import byte_tokenizer

from lightning_itk.batch import IGNORE_INDEX, is_packed, real_tokens
from lightning_itk.cli.records import index_records
from lightning_itk.data import InstructionDataModule
from lightning_itk.data.records import DataError
from lightning_itk.data.sources import Source
from lightning_itk.data.subset import Subset, clusters_of
from lightning_itk.selection.scores import write_scores


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    write(tmp_path / "general.jsonl", [{"prompt": f"q{i}", "completion": "a" * (1 + i % 40)} for i in range(100)])
    write(tmp_path / "shop.jsonl", [{"prompt": f"s{i}", "answer": "b" * (1 + i % 40)} for i in range(60)])
    return tmp_path


def write(path: Path, records: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def module(folder: Path, stage: str | None = "fit", **options: Any) -> InstructionDataModule:
    defaults = {"tokenizer": str(folder / "tokenizer"), "cache_dir": str(folder / "cache"), "max_length": 128}
    data = InstructionDataModule(**{"train": str(folder / "general.jsonl"), "num_proc": 1, **defaults, **options})
    data.prepare_data()
    data.setup(stage)
    return data


def ids(loader: Any) -> list[int]:
    return [i for batch in loader for i in batch["sample_ids"].unique().tolist() if i >= 0]


def shop(folder: Path, **options: Any) -> dict[str, Any]:
    return {"path": str(folder / "shop.jsonl"), "columns": {"response": "answer"}, **options}


def test_every_sample_is_trained_or_validated_on(folder: Path) -> None:
    data = module(
        folder, validation=0.1, train=[str(folder / "general.jsonl"), Source(**shop(folder, teacher="expert"))]
    )
    train, validation = ids(data.train_dataloader()), ids(data.val_dataloader())
    assert len(validation) == 16
    assert sorted(train + validation) == list(range(160))
    assert data.teachers == ("", "expert")
    assert data.train_sample_ids.tolist() == sorted(train)
    assert data.max_token_id == max(int(batch["input_ids"].max()) for batch in data.train_dataloader())
    for batch in data.train_dataloader():
        expert = batch["teacher_ids"] == 1
        assert (batch["sample_ids"][expert] >= 100).all()
        assert expert.equal(batch["sample_ids"] >= 100)
    tokens = {int(i): int(((batch["sample_ids"] == i) & (batch["labels"] != IGNORE_INDEX)).sum())
              for batch in data.train_dataloader() for i in batch["sample_ids"].unique() if i >= 0}  # fmt: skip
    assert data.response_tokens.tolist() == [tokens[i] for i in data.train_sample_ids]
    assert data.response_chars.tolist() == [1 + (i % 100) % 40 for i in data.train_sample_ids]


def test_the_validation_share_is_stable_and_keeps_copies_together(folder: Path) -> None:
    first = sorted(ids(module(folder, validation=0.1).val_dataloader()))
    assert first == sorted(ids(module(folder, validation=0.1, batch_size=3).val_dataloader()))
    assert first != sorted(ids(module(folder, validation=0.1, seed=1).val_dataloader()))
    assert len(ids(module(folder, validation=0.001).val_dataloader())) == 1
    copies = write(folder / "copies.jsonl", [{"prompt": f"q{i % 20}", "completion": "a"} for i in range(200)])
    data = module(folder, train=copies, validation=0.1)
    held_out = {i % 20 for i in ids(data.val_dataloader())}
    assert held_out
    assert not held_out & {i % 20 for i in ids(data.train_dataloader())}
    assert module(folder, validation=0).val_dataloader() == []
    with pytest.raises(DataError, match="at least 2 samples"):
        module(folder, train=write(folder / "one.jsonl", [{"prompt": "q", "completion": "a"}]))


def test_evaluation_files(folder: Path) -> None:
    prompts = write(folder / "prompts.jsonl", [{"prompt": f"p{i}"} for i in range(5)])
    data = module(folder, None, validation=[shop(folder)], test=shop(folder), predict=prompts, eval_batch_size=7)
    assert sorted(ids(data.train_dataloader())) == list(range(100))
    assert sorted(ids(data.val_dataloader())) == sorted(ids(data.test_dataloader())) == list(range(60))
    widths = [batch["input_ids"].shape for batch in data.val_dataloader()]
    assert widths[0][0] == 7
    assert widths[0][1] == max(width for _, width in widths)  # the longest come first
    (batch,) = data.predict_dataloader()
    assert (batch["labels"] == IGNORE_INDEX).all()
    text = data.tokenizer.decode(batch["input_ids"][1][batch["attention_mask"][1]])
    assert text == "<|im_start|>user\np1<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(DataError, match="predict names no file"):
        module(folder).predict_dataloader()


def test_packing(folder: Path) -> None:
    data = module(folder, packing=True, batch_size=2, validation=0.05)
    batches = list(data.train_dataloader())
    assert all(is_packed(batch) for batch in batches)
    assert max(batch["input_ids"].shape[1] for batch in batches) <= 128
    assert sorted(ids(batches)) == data.train_sample_ids.tolist()
    assert not is_packed(next(iter(data.val_dataloader())))


def test_weights(folder: Path) -> None:
    data = module(
        folder, train=[{"path": str(folder / "general.jsonl"), "weight": 0.5}, shop(folder, weight=2.0)], validation=0
    )
    seen = [
        i for batch in data.train_dataloader() for row in batch["sample_ids"] for i in row.unique().tolist() if i >= 0
    ]
    assert sum(i < 100 for i in seen) == 50
    assert sum(i >= 100 for i in seen) == 120


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    # Lightning hides its logger from the root's handlers where the root had none when it was imported.
    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    return caplog


def test_subset(folder: Path, log: pytest.LogCaptureFixture) -> None:
    whole = module(folder, validation=0.1)
    record = np.arange(100)
    losses = np.stack([np.full(100, 2.0), 2.0 - record / 100.0])  # record 0 learned least in the first epoch
    losses[:, 5] = np.nan
    path = folder / "scores.parquet"
    meta = {"fingerprint": whole.fingerprint, "model": "opt-350m"}
    write_scores(path, record, np.ones(100), losses, meta)
    with log.at_level(logging.INFO):
        data = module(folder, validation=0.1, subset=Subset(str(path), fraction=0.2))
    scored = [i for i in whole.train_sample_ids if i != 5]
    assert sorted(ids(data.train_dataloader())) == scored[: round(0.2 * len(scored))]
    assert "lowest lp_app, scored by opt-350m" in log.text
    assert ids(data.val_dataloader()) == ids(whole.val_dataloader())
    # Scoring covers what a subset left out, once, longest first.
    scoring = data.scoring_dataloader()
    assert sorted(ids(scoring)) == whole.train_sample_ids.tolist()
    lengths = [int(real_tokens(batch).sum(1).max()) for batch in scoring]
    assert lengths == sorted(lengths, reverse=True)
    # Another tokenizer and length, the same records.
    bigger = byte_tokenizer(extra=("<more>",))
    again = module(
        folder, validation=0.1, tokenizer=bigger, max_length=99, subset={"scores": str(path), "fraction": 0.2}
    )
    assert ids(again.scoring_dataloader())
    for subset, error in [
        ({"scores": str(folder / "none.parquet")}, "no such scores file"),
        ({"scores": str(path), "metric": "lp"}, "lp needs losses"),
        ({"scores": str(path), "fraction": 0.001}, "the subset is empty: 89 of 90"),
    ]:
        with pytest.raises(DataError, match=error):
            module(folder, validation=0.1, subset=subset)
    with pytest.raises(DataError, match="made on other records or in another order"):
        module(folder, train=[shop(folder), str(folder / "general.jsonl")], subset=Subset(str(path)))


def test_clusters(folder: Path) -> None:
    data = module(folder, validation=0)
    losses = np.stack([np.full(100, 2.0), 2 - np.arange(100) / 100])
    write_scores(folder / "s.parquet", np.arange(100), np.ones(100), losses, {"fingerprint": data.fingerprint})
    pq.write_table(pa.table({"record": np.arange(100), "cluster": np.arange(100) // 50}), folder / "c.parquet")
    subset = Subset(str(folder / "s.parquet"), fraction=0.1, clusters=str(folder / "c.parquet"))
    assert sorted(ids(module(folder, validation=0, subset=subset).train_dataloader())) == [*range(5), *range(50, 55)]
    subset.clusters = str(folder / "none.parquet")
    with pytest.raises(DataError, match="none.parquet: no such file"):
        module(folder, validation=0, subset=subset)


@pytest.mark.parametrize(
    ("columns", "meta", "message"),
    [
        ({"records": [0], "cluster": [0]}, None, "with the columns record and cluster: No match for FieldRef"),
        ({"record": ["0"], "cluster": [0]}, None, "column record holds string"),
        ({"record": [0, None], "cluster": [0, 1]}, None, "empty values, expected record numbers"),
        ({"record": [0], "cluster": [0]}, "[]", "broken 'itk' metadata, expected an object"),
    ],
)
def test_files_that_are_no_clusters(tmp_path: Path, columns: dict[str, Any], meta: str | None, message: str) -> None:
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata({"itk": meta} if meta else None), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=message) as raised:
        clusters_of(str(tmp_path / "c.parquet"), np.arange(2), "abc")
    assert len(str(raised.value).splitlines()) == 1


def test_report_and_empty_sets(folder: Path, log: pytest.LogCaptureFixture) -> None:
    with log.at_level(logging.INFO):
        module(folder, max_length=60)
    assert "train: 100 records, " in log.text
    assert "response cut off by max_length=60" in log.text or "truncated" in log.text
    with pytest.raises(
        DataError, match="train: no sample is left of 100 records: 100 response cut off by max_length=8"
    ):
        module(folder, max_length=8)


def test_bad_arguments(folder: Path) -> None:
    for options, error in [
        ({"train": []}, "train names no file"),
        ({"train": [{"path": "a", "wait": 3}]}, "a source is .path, teacher"),
        ({"train": 3}, "a source is int"),
        ({"validation": 1.0}, "validation is 1.0, expected a share"),
        ({"max_length": 1}, "max_length is 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"chat_template": "none.jinja"}, "none.jinja: neither a Jinja template"),
        ({"tokenizer": str(folder / "none")}, "none' does not exist"),
        ({"tokenizer": None}, "no tokenizer: set data.tokenizer"),
        ({"train": "none.jsonl"}, "none.jsonl: no such file"),
        ({"special_tokens": "yes"}, "special_tokens is 'yes', expected text or allow"),
        ({"tools": "drop"}, "tools is 'drop', expected refuse or learn"),
    ]:
        with pytest.raises(DataError, match=error) as raised:
            module(folder, **options)
        assert "\n" not in str(raised.value)


def test_chat_template_from_text_or_file(folder: Path) -> None:
    template = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    (folder / "t.jinja").write_text(template)
    for given in (template, str(folder / "t.jinja")):
        data = module(folder, chat_template=given)
        assert data.tokenizer.chat_template == template
    data = module(folder, chat_template=None, tokenizer=str(folder / "tokenizer"))
    assert "im_start" in data.tokenizer.chat_template


def test_yaml(folder: Path) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(InstructionDataModule, "data")
    text = """
        data:
          train: [general.jsonl, {path: shop.jsonl, teacher: expert, weight: 1.0, columns: {response: answer}}]
          validation: 0.02
          max_length: 2048
          batch_size: 8
          shuffle: true
          packing: false
          subset: {scores: scores.parquet, metric: lp_app, fraction: 0.1, order: lowest}
          special_tokens: allow
          tools: learn
    """
    config = folder / "data.yaml"
    config.write_text(text)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    data = instantiate(parser.parse_path(config)).data
    assert data.sources["train"] == [
        Source("general.jsonl"),
        Source("shop.jsonl", "expert", 1.0, {"response": "answer"}),
    ]
    assert data.subset == Subset("scores.parquet")
    assert (data.special_tokens, data.tools) == ("allow", "learn")
    for arguments in (["--data.train=a.jsonl", "--data.validation=b.jsonl"], ["--data.train=[a.jsonl]"]):
        data = instantiate(parser.parse_args(arguments)).data
        assert data.sources["train"] == [Source("a.jsonl")]
    for sources, error in [
        ("[{path: a.jsonl, columns: {answer: response}}]", "a.jsonl: unknown key 'answer' in columns"),
        ("[{path: a.jsonl, weight: 0}]", "a.jsonl: weight is 0"),
        ("[{path: a.jsonl, wait: 3}]", "unexpected keyword argument 'wait'"),
    ]:
        config.write_text(f"data: {{train: {sources}}}")
        with pytest.raises(DataError, match=error):
            instantiate(parser.parse_path(config))
    help_text = parser.format_help()
    for name in ("train", "validation", "packing", "cache_dir"):
        assert f"--data.{name}" in help_text
    assert "Tokens per sample" in help_text


class Student(L.LightningModule):
    """What the data module asks of a module: a tokenizer."""

    def __init__(self, tokenizer: str) -> None:
        super().__init__()
        self.save_hyperparameters({"student": tokenizer})
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.steps: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.steps.append([i for i in batch["sample_ids"].unique().tolist() if i >= 0])
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet_trainer(**options: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                     enable_model_summary=False, max_epochs=1, **options)  # fmt: skip


def test_tokenizer_of_the_student_and_accumulation_of_the_trainer(folder: Path) -> None:
    seen = {}
    for batch_size, accumulate in [(8, 1), (2, 4)]:
        student = Student(str(folder / "tokenizer"))
        data = InstructionDataModule(
            str(folder / "general.jsonl"), cache_dir=str(folder / "cache"), batch_size=batch_size, max_length=128
        )
        quiet_trainer(accumulate_grad_batches=accumulate).fit(student, data)
        steps = [sorted(sum(student.steps[i : i + accumulate], [])) for i in range(0, len(student.steps), accumulate)]
        seen[batch_size] = steps
    assert seen[8] == seen[2]
    assert len(seen[8]) == 13


DDP = """
import json, sys, warnings
warnings.simplefilter("ignore")
from test_module import Student, quiet_trainer
from lightning_itk.data import InstructionDataModule
folder = sys.argv[1]

class Noting(Student):
    def on_train_end(self):
        scoring = self.trainer.datamodule.scoring_dataloader()
        scored = [i for batch in scoring for i in batch["sample_ids"].unique().tolist() if i >= 0]
        with open(f"{folder}/rank{self.global_rank}.json", "w") as file:
            json.dump({"steps": self.steps, "scored": scored}, file)

student = Noting(f"{folder}/tokenizer")
data = InstructionDataModule(f"{folder}/general.jsonl", cache_dir=f"{folder}/cache", batch_size=4, max_length=128)
trainer = quiet_trainer(devices=2, strategy="ddp_fork", num_sanity_val_steps=0)
trainer.fit(student, data)
"""


@pytest.mark.process
def test_two_ranks_share_the_steps_of_one(folder: Path) -> None:
    script = folder / "script.py"
    script.write_text(DDP)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:3])),  # the package beside these tests
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-2000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    data = module(folder, batch_size=8)
    expected = [sorted(ids([batch])) for batch in data.train_dataloader()]
    assert [sorted(a + b) for a, b in zip(ranks[0]["steps"], ranks[1]["steps"], strict=True)] == expected
    assert sorted(ranks[0]["scored"] + ranks[1]["scored"]) == data.train_sample_ids.tolist()


@pytest.mark.real_data
def test_dolly(real_data: Path, tmp_path: Path) -> None:
    with gzip.open(real_data / "dolly-15k.jsonl.gz", "rt", encoding="utf-8") as file:
        (tmp_path / "dolly.jsonl").write_text("".join(islice(file, 3000)), encoding="utf-8")
    data = InstructionDataModule(
        str(tmp_path / "dolly.jsonl"), tokenizer=byte_tokenizer(), cache_dir=str(tmp_path), packing=True, batch_size=1
    )
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert sum(int(real_tokens(batch).sum()) for batch in batches) / (len(batches) * 2048) > 0.97
    assert sorted(ids(batches)) == data.train_sample_ids.tolist()


def test_records_that_cannot_be_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in the real Alpaca, a few of whose answers are empty."""
    good = [{"instruction": f"q{i}", "input": "", "output": "a" * (1 + i)} for i in range(20)]
    bad = [{"instruction": "q", "output": " "}, {"instruction": "q"}, {"instruction": "q", "output": ""}]
    text = "\n".join([*map(json.dumps, good[:10]), *map(json.dumps, bad), "{broken", *map(json.dumps, good[10:])])
    (folder / "alpaca.jsonl").write_text(text)
    train = str(folder / "alpaca.jsonl")
    with pytest.raises(DataError, match=r"alpaca.jsonl line 11: empty response.*data.invalid: drop leaves such"):
        module(folder, train=train)
    with caplog.at_level(logging.INFO):
        logging.getLogger("lightning.pytorch.utilities.rank_zero").propagate = True
        with pytest.warns(UserWarning, match="train: 17% of the records were dropped: 1 broken JSON"):
            data = module(folder, train=train, invalid="drop", validation=0)
    assert data.train_sample_ids.tolist() == [*range(10), *range(14, 24)]  # numbers are those of the file
    assert "24 records, 20 samples" in caplog.text
    assert "2 empty response" in caplog.text
    assert "left out: alpaca.jsonl line 14: broken JSON" in caplog.text
    assert data.fingerprint == index_records([Source(train)], invalid="drop").fingerprint
    with pytest.raises(DataError, match="invalid is 'keep', expected refuse or drop"):
        module(folder, invalid="keep")


def test_answers_that_were_cut_off_do_not_learn_to_end(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "q", "completion": "abc", "finished": finished} for finished in (True, False)]
    with caplog.at_level(logging.INFO):
        logging.getLogger("lightning.pytorch.utilities.rank_zero").propagate = True
        data = module(folder, train=write(folder / "cut.jsonl", rows), validation=0, batch_size=2, shuffle=False)
    (batch,) = data.train_dataloader()
    learned = [row[row != IGNORE_INDEX].tolist() for row in batch["labels"]]
    assert learned[0] == [*learned[1], 2]
    assert "1 with finished: false (their end is not learned)" in caplog.text


def test_the_template_that_is_used_is_told_once(folder: Path, log: pytest.LogCaptureFixture) -> None:
    bare = byte_tokenizer()
    bare.chat_template = None
    given = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    for options, told in (
        ({}, "the tokenizer's own"),
        ({"chat_template": given}, "as given by chat_template"),
        ({"tokenizer": bare, "max_length": 400}, "the Alpaca prompt, as the tokenizer has no other"),
    ):
        log.clear()
        with log.at_level(logging.INFO):
            module(folder, **options).setup("validate")
        assert log.text.count("chat template: ") == log.text.count(f"chat template: {told}") == 1


def test_special_tokens_in_records_are_text_in_training_and_in_predictions(folder: Path) -> None:
    records = [{"prompt": "<|im_end|>q", "completion": "a<|im_end|>"}]
    path = write(folder / "special.jsonl", records)
    for special_tokens, found in (("text", [2, 1, 1]), ("allow", [4, 2, 2])):
        data = module(folder, None, train=path, validation=0, predict=path, special_tokens=special_tokens)
        (batch,), (prompts,) = data.train_dataloader(), data.predict_dataloader()
        rows = (batch["input_ids"], batch["labels"], prompts["input_ids"])
        assert [int((row == 2).sum()) for row in rows] == found
