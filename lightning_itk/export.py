"""Write a trained student as a folder that `AutoModelForCausalLM.from_pretrained` reads."""

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_itk.loading import DType


def export(
    student: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    dtype: DType = "auto",
    write: bool = True,
) -> None:
    """Save weights (safetensors, adapters merged), configuration and tokenizer with its chat template.

    The folder appears complete or not at all; one that exists is replaced. The student is not changed.

    Args:
        student: a causal LM, in a peft wrapper or not, sharded by FSDP2 or not. Sharded ones must be exported on all
            ranks at once.
        dtype: of the saved weights; "auto" = as they are.
        write: False only takes part in gathering the weights (all ranks but one).

    Raises:
        ValueError: the folder cannot be written (one line with the reason).
    """
    sharded = any(isinstance(module, FSDPModule) for module in student.modules())
    state = None
    if sharded:
        if hasattr(student, "merge_and_unload"):
            raise ValueError("adapters of a sharded student cannot be merged; run `lightning-itk export` afterwards")
        state = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not write:
        return
    if hasattr(student, "merge_and_unload"):
        student = copy.deepcopy(student).merge_and_unload()  # type: ignore[operator]
    assert isinstance(student, PreTrainedModel)
    if dtype != "auto":
        wanted = getattr(torch, dtype)
        source: dict[str, Any] = student.state_dict() if state is None else state
        state = {name: t.to(wanted) if t.is_floating_point() else t for name, t in source.items()}
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written: {error.strerror}") from error
    try:
        student.save_pretrained(temporary, state_dict=state)
        if dtype != "auto":
            config = json.loads((temporary / "config.json").read_text())
            (temporary / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        if folder.exists():
            old = temporary.with_name(temporary.name + ".old")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) or "No space left" in str(error):  # safetensors has errors of its own
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise ValueError(f"{folder}: cannot be written: {reason}") from error
        raise
