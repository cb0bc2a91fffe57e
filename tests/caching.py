"""What the tests of cached teachers share: records, a run of a teacher over them, and the bytes it wrote."""

import hashlib
import json
import os
import signal
from pathlib import Path

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import QUIET, byte_tokenizer, tiny_model

import lightning_itk as itk
from lightning_itk.data.single_pass import SinglePass
from lightning_itk.methods import teacher_run
from lightning_itk.methods.teacher import Teacher
from lightning_itk.methods.teacher_run import TeacherRun

WIDE = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 48}


def write_data(folder: Path, count: int = 26) -> str:
    """Records of very different lengths, every third one an expert's, two alike."""
    rows = [
        {"prompt": f"q{i}", "completion": "ab" * (1 + 5 * i % 13), "teacher": "expert" if i % 3 == 0 else ""}
        for i in range(count)
    ]
    rows[-1] = rows[0]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_module(path: str, **options) -> itk.InstructionDataModule:
    defaults = {"tokenizer": byte_tokenizer(), "max_length": 48, "batch_size": 4, "num_proc": 1, "validation": 0.2}
    return itk.InstructionDataModule(path, **{**defaults, "cache_dir": str(Path(path).parent / "cache"), **options})


def trainer(strategy: str = "auto", ranks: int = 1, **options) -> L.Trainer:
    kind = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if strategy == "fsdp2" else strategy
    quiet = {**QUIET, "inference_mode": False, "enable_checkpointing": False}
    return L.Trainer(**{**quiet, "devices": ranks, "strategy": kind, **options})


def cache(
    path: str,
    output: Path,
    *,
    teacher=None,
    strategy: str = "auto",
    ranks: int = 1,
    kill_after: int = 0,
    data: dict | None = None,
    precision: str = "32-true",
    wanted=None,
    **options,
) -> TeacherRun:
    """Run a tiny teacher over the records at `path`, in shards of 160 tokens; perhaps die after some shards."""
    model = teacher or Teacher(tiny_model("llama", 1, **WIDE))
    run = TeacherRun(model, output, **options)
    if kill_after:
        written, original = [], teacher_run.write_shard

        def dying(*args) -> None:
            original(*args)
            written.append(args)
            if len(written) == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

        teacher_run.write_shard = dying
    one = trainer(strategy, ranks, precision=precision)
    one.predict(run, datamodule=SinglePass(data_module(path, **(data or {})), wanted, 160), return_predictions=False)
    if one.is_global_zero:
        run.finish()
    return run


def hashes(folder: Path) -> dict[str, str]:
    """What is in a folder, tokenizer aside."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}
