"""RecordResults: a row per held-out record, equal to what validation logs, whatever the layout and number of ranks."""

import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import runs
import torch
from processes import run_ranks
from tiny import QUIET, byte_tokenizer, tiny_model

import lightning_itk as itk
from lightning_itk.evaluation.record_results import read_results
from lightning_itk.results import RecordResults

FIGURES = ("response_loss", "token_accuracy", "kl", "teacher_response_loss", "teacher_agreement")


def validate(data: str, folder: Path, module=None, ranks: int = 1, results: RecordResults | None = None, **options):
    """The logged figures of a validation that records its results in a folder."""
    module = module or itk.KDModule(tiny_model("llama", 0), tiny_model("llama", 1), temperature=2.0)
    settings = {"max_length": 96, "batch_size": 2, "num_proc": 1, "validation": 0.5, "tokenizer": byte_tokenizer()}
    datamodule = itk.InstructionDataModule(data, cache_dir=str(Path(data).parent / "cache"), **settings | options)
    results = results or RecordResults(str(folder / "results.parquet"))
    trainer = L.Trainer(**QUIET, devices=ranks, callbacks=[results], strategy="ddp" if ranks > 1 else "auto")
    return trainer.validate(module, datamodule, verbose=False)[0]


def on_rank(data: str, folder: Path) -> None:
    validate(data, folder, ranks=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_records(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def recorded(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    logged = validate(data, folder)
    return logged, *read_results(folder / "results.parquet")


def test_the_rows_add_up_to_what_is_logged(recorded):
    logged, columns, meta = recorded
    assert len(columns["record"]) == len(set(columns["record"])) == 21
    share = columns["tokens"] / columns["tokens"].sum()
    for name in FIGURES:
        np.testing.assert_allclose(columns[name] @ share, logged[f"val/{name}"], rtol=1e-5, err_msg=name)
        assert columns[name].std() > 0 or name in ("token_accuracy", "teacher_agreement")  # of random models
    assert meta["stage"] == "val"
    assert meta["method"] == "KDModule"
    assert meta["data"]


@pytest.mark.process
def test_layout_and_ranks_do_not_matter(recorded, data, tmp_path):
    _, expected, _ = recorded
    validate(data, tmp_path / "packed", packing=True)
    run_ranks(on_rank, data, tmp_path / "ranks")
    for folder in ("packed", "ranks"):
        columns, _ = read_results(tmp_path / folder / "results.parquet")
        assert columns["record"].tolist() == expected["record"].tolist()
        for name in FIGURES:
            np.testing.assert_allclose(columns[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=f"{folder} {name}")


def test_each_teacher_has_its_own_records(tmp_path):
    rows = [{"prompt": f"a{i}", "completion": "b" * (i + 1), "teacher": ["", "expert"][i % 2]} for i in range(12)]
    path = tmp_path / "tagged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teachers = {"reference": tiny_model("llama", 1), "expert": tiny_model("llama", 2)}
    validate(str(path), tmp_path, itk.DAEModule(tiny_model("llama", 0), teachers))
    columns, _ = read_results(tmp_path / "results.parquet")
    expert = columns["record"] % 2 == 1
    assert 0 < expert.sum() < len(expert)
    assert np.isfinite(columns["kl/expert"]).tolist() == expert.tolist()
    assert np.isfinite(columns["kl/reference"]).tolist() == (~expert).tolist()


@pytest.mark.parametrize("packing", [False, True])
def test_exact_match_is_the_greedy_answer(data, tmp_path, packing):
    """A student that says a letter for ever, against responses that do and do not."""

    class Fixed(torch.nn.Module):
        def forward(self, states):
            logits = torch.zeros(*states.shape[:-1], 300)
            logits[..., byte_tokenizer().convert_tokens_to_ids("x")] = 9.0
            return logits

    rows = [{"prompt": f"p{i}", "completion": "xxxx" if i % 3 else "xyx"} for i in range(12)]
    path = tmp_path / "letters.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    student = tiny_model("llama", 0)
    module = itk.SFTModule(student, max_new_tokens=4)
    with torch.no_grad():
        student.get_input_embeddings().weight.zero_()
        student.lm_head.weight.zero_()
    head = student.lm_head
    head.register_forward_hook(lambda _, args, out: Fixed()(args[0]))
    results = RecordResults(str(tmp_path / "results.parquet"), exact_match=True)
    validate(str(path), tmp_path, module, results=results, packing=packing)
    columns, _ = read_results(tmp_path / "results.parquet")
    assert columns["exact_match"].tolist() == [float(record % 3 > 0) for record in columns["record"]]


def test_a_run_replaces_its_own_results_and_no_others(data, tmp_path):
    module = itk.SFTModule(tiny_model("llama", 0), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    options = {"max_length": 96, "batch_size": 2, "num_proc": 1, "validation": 0.5, "tokenizer": byte_tokenizer()}
    datamodule = itk.InstructionDataModule(data, cache_dir=str(tmp_path / "cache"), **options)
    path = tmp_path / "results.parquet"
    trainer = L.Trainer(
        **QUIET, callbacks=[RecordResults(str(path))], max_epochs=2, enable_checkpointing=False, limit_train_batches=2
    )
    trainer.fit(module, datamodule)
    columns, meta = read_results(path)
    assert meta["step"] == 4  # the last validation's
    mean = columns["response_loss"] @ columns["tokens"] / columns["tokens"].sum()
    assert mean == pytest.approx(float(trainer.callback_metrics["val/response_loss"]), rel=1e-5)
    with pytest.raises(ValueError, match="exists already"):
        validate(data, tmp_path)
    validate(data, tmp_path, results=RecordResults(str(path), overwrite=True))
    path.write_bytes(b"somebody's")
    with pytest.raises(ValueError, match="changed since"):
        validate(data, tmp_path, results=RecordResults(str(path), overwrite=True))
    assert path.read_bytes() == b"somebody's"


@pytest.mark.parametrize("content", [None, b"", b"PAR1 not", "parquet"])
def test_what_is_no_results_file(tmp_path, content):
    path = tmp_path / "r.parquet"
    if content == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"record": [1]}), path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"r\.parquet: (no such file|is no file of results)"):
        read_results(path)
