"""Configurations through the real command line, up to where work would begin: accepted, or one line and exit code 1."""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub.constants
import numpy as np
from fuzz.engine import one_line
from fuzz.values import damaged, mutated
from hypothesis import strategies as st
from tiny import byte_tokenizer, tiny_model
from transformers.utils import logging as transformers_logging

from lightning_itk.cli import generate, select
from lightning_itk.cli.fit import InstructionCLI
from lightning_itk.cli.main import main
from lightning_itk.cli.records import index_records
from lightning_itk.data.sources import DataError, Source, as_sources
from lightning_itk.selection.scores import write_scores

VALUES = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1e30, 10**30, float("nan"), float("inf"), "", "x", "auto", "2", "1e-3",
     "${data.train}", "${nope}", "{{ x", "line\nbreak", "é", [], ["x"], [1, [2]], {}, {"x": 1},
     {"path": "train.jsonl"}, "train.jsonl", "none.jsonl", "m", ".", "lowest", "random", "drop", "bfloat16",
     "torch", "triton", "jsd", "null", {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
     {"class_path": "torch.nn.Linear"}, {"class_path": "no"}, {"scores": "s.parquet"},
     {"scores": "train.jsonl", "fraction": 2}]
)  # fmt: skip
DATA = {
    "train": [
        "train.jsonl",
        {"path": "train.jsonl", "teacher": "law", "weight": 2.0, "columns": {"response": "completion"}},
    ],
    "validation": 0.25, "test": None, "predict": None, "tokenizer": None, "chat_template": None, "max_length": 64,
    "batch_size": 2, "eval_batch_size": None, "shuffle": True, "packing": False,
    "subset": {"scores": "s.parquet", "metric": "lp_app", "fraction": 0.5, "order": "lowest", "clusters": None},
    "num_workers": 0, "num_proc": 1, "cache_dir": None, "invalid": "refuse", "seed": 0,
}  # fmt: skip
MODEL = {
    "student_kwargs": {"revision": "main"},
    "student": "m", "dtype": "float32", "lora": None, "gradient_checkpointing": False, "warmup": 0.03,
    "max_new_tokens": 8,
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}, "lr_scheduler": "cosine",
    "nonfinite": "stop", "router_weight": None, "impl": "auto", "trust_remote_code": False,
}  # fmt: skip
DISTILLED = MODEL | {
    "temperature": 1.0, "ce_weight": 0.0, "kl_weight": 1.0, "kind": "forward", "beta": 0.5,
    "attention": {"weight": 1.0, "layers": "all"}, "teacher_dtype": "auto", "teacher_kwargs": None,
    "teacher_offload": False,
}  # fmt: skip
TRAINER = {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "logger": False, "callbacks": [],
           "accumulate_grad_batches": 2, "precision": "32-true", "gradient_clip_val": 1.0}  # fmt: skip
CONFIGS: dict[str, list[Any]] = {
    "fit": [
        {"trainer": TRAINER, "data": DATA, "model": {"class_path": f"lightning_itk.{name}", "init_args": arguments}}
        for name, arguments in (
            ("SFTModule", MODEL),
            ("KDModule", DISTILLED | {"teacher": "m"}),
            ("DAEModule", DISTILLED | {"teachers": {"law": "m", "x": "m"}, "default_teacher": "x"}),
        )
    ],
    "select": [
        {"scores": "s.parquet", "data": "train.jsonl", "output": "out/chosen.jsonl", "fraction": 0.5,
         "metric": "lp_app", "order": "lowest", "clusters": None, "invalid": "refuse", "seed": 0}
    ],
    "generate": [
        {"model": "m", "prompts": "train.jsonl", "output": "out/answers.jsonl", "max_new_tokens": 2, "batch_size": 2,
         "temperature": 0.0, "seed": 0, "dtype": "auto", "limit": None, "teacher": None, "chat_template": None,
         "device": "cpu", "trust_remote_code": False}
    ],
    "choose-teacher": [
        {"student": "m", "candidates": {"a": "a.jsonl", "b": {"path": "b.jsonl"}}, "reward_column": None, "beta": 3.0,
         "shift": 0.0, "negative": "refuse", "missing": "refuse", "output": "out/table.json", "max_length": 64,
         "batch_size": 2, "dtype": "float32", "chat_template": None, "resamples": 5, "seed": 0, "device": "cpu"}
    ],
}  # fmt: skip


def case(data: st.DataObject) -> str:
    """One command with a configuration that is nearly right, or a list of sources."""
    draw = data.draw
    command = draw(st.sampled_from(["sources", *CONFIGS]), label="command")
    if command == "sources":
        return f"sources {sources(draw)}"
    config = draw(st.sampled_from(CONFIGS[command]), label="configuration")
    changes = draw(st.integers(0, 3), label="changes")
    for _ in range(changes):
        config = mutated(draw, config, VALUES)
    raw = json.dumps(config, ensure_ascii=False).encode()
    if spoilt := draw(st.integers(0, 9), label="damage the text") == 9:
        raw = damaged(draw, raw)
    with world() as folder:
        (folder / "c.yaml").write_bytes(raw)
        code, said = run(command, "--config", "c.yaml")
    if "looks like a bug" in said:
        error = said.split("lightning-itk: error: ")[-1]
        words = re.sub(r"[^a-z A-Z]+", " ", error)[:60]  # what tells one bug from another
        raise AssertionError(f"{command} looks like a bug to itself, {words}: {error}")
    lines = [line for line in said.splitlines() if line.startswith("lightning-itk: ")]
    assert "Traceback" not in said, said[-2000:]
    assert code in (0, 1), f"exit code {code}"
    assert len(lines) == code, f"exit code {code} with {said[-2000:]!r}"
    if code == 1:
        assert lines[0].startswith("lightning-itk: error: "), f"{said[-2000:]!r}"
        one_line(ValueError(lines[0]), longest=1100)
    assert code == 0 or changes or spoilt, lines
    return f"{command} {'refused' if code else 'accepted'}"


def sources(draw: Any) -> str:
    """What `data.train` may be given in Python."""
    given = mutated(draw, DATA["train"], VALUES)
    try:
        found = as_sources(given)
    except DataError as error:
        one_line(error)
        return "refused"
    assert all(isinstance(source, Source) for source in found)
    return "accepted"


def run(*args: str) -> tuple[int, str]:
    """Exit code and stderr of a command that trains nothing and answers nothing."""
    said, path = io.StringIO(), list(sys.path)
    with (
        mock.patch.object(InstructionCLI, "_run_subcommand", return_value=None),
        mock.patch.object(generate, "write_responses", return_value=[]),
        mock.patch.object(select, "find_spec", return_value=None),  # no picture
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(said),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            code = main(list(args))
        finally:
            logging.disable(logging.NOTSET)
            sys.path[:] = path
    return code, said.getvalue()


@cache
def originals() -> Path:
    """A folder with a model, records, responses and scores; gone with the process."""
    folder = tempfile.TemporaryDirectory(prefix="itk-fuzz-")
    originals.keep = folder  # type: ignore[attr-defined]
    path = Path(folder.name)
    transformers_logging.disable_progress_bar()
    tiny_model().save_pretrained(path / "m")
    byte_tokenizer().save_pretrained(path / "m")
    rows = [{"prompt": f"say {i}", "completion": "x" * (i + 1), "kind": "ab"[i % 2]} for i in range(8)]
    for name in ("train", "a", "b"):
        answers = [row | {"reward": float(i + len(name)), "finished": True} for i, row in enumerate(rows)]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    fingerprint = index_records([Source(str(path / "train.jsonl"))]).fingerprint
    losses = np.stack([np.full(8, 2.0), 2.0 - np.arange(8) / 9])
    write_scores(path / "s.parquet", np.arange(8), np.arange(8) + 1, losses, {"fingerprint": fingerprint})
    return path


@contextlib.contextmanager
def world() -> Iterator[Path]:
    """A fresh folder to be in, with all that a configuration may name."""
    folder, before = Path(tempfile.mkdtemp(prefix="itk-fuzz-")), Path.cwd()
    for file in originals().iterdir():
        (folder / file.name).symlink_to(file)
    os.chdir(folder)
    try:
        with mock.patch.dict(os.environ, {"ITK_CACHE": str(folder / "cache")}):
            yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder)
