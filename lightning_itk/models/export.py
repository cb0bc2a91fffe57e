"""A trained student as a folder that `AutoModelForCausalLM.from_pretrained` reads, also out of a checkpoint."""

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_itk.files import take_place
from lightning_itk.models.checkpoint import read_checkpoint
from lightning_itk.models.hidden import base_causal_lm
from lightning_itk.models.loading import DType, LoRA, add_lora, load_causal_lm
from lightning_itk.models.precision import reshard

_MANIFEST = "itk_export.json"  # which files of a folder an export wrote


def export(
    student: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    dtype: DType = "auto",
    write: bool = True,
) -> None:
    """Save weights (safetensors, adapters merged), configuration and tokenizer with its chat template.

    The folder appears complete or not at all. An earlier export is replaced, and nothing else: a file that no export
    wrote is never touched. The student is not changed.

    Args:
        student: a causal LM, in a peft wrapper or not, sharded by FSDP2 or not. Sharded ones must be exported on all
            ranks at once.
        dtype: of the saved weights; "auto" = as they are.
        write: False only takes part in gathering the weights (all ranks but one).

    Raises:
        ValueError: the folder cannot be written, or holds what no export wrote (one line with the reason).
    """
    sharded = any(isinstance(module, FSDPModule) for module in student.modules())
    state = None
    if sharded and hasattr(student, "merge_and_unload"):
        student = _gathered(student)
    elif sharded:
        state = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not write:
        return
    if hasattr(student, "merge_and_unload"):
        student = (student if sharded else copy.deepcopy(student)).merge_and_unload()  # type: ignore[operator]
    assert isinstance(student, PreTrainedModel)
    if dtype != "auto":
        wanted = getattr(torch, dtype)
        source: dict[str, Any] = student.state_dict() if state is None else state
        state = {name: t.to(wanted) if t.is_floating_point() else t for name, t in source.items()}
    folder = Path(folder).resolve()  # the target of a link, which stays
    check_replaceable(folder)
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
        written = sorted(path.name for path in temporary.iterdir())
        (temporary / _MANIFEST).write_text(json.dumps({"files": written}, indent=2) + "\n")
        temporary.chmod(0o755)
        take_place(temporary, folder)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) or "No space left" in str(error):  # safetensors has errors of its own
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise ValueError(f"{folder}: cannot be written: {reason}") from error
        raise


def _gathered(student: torch.nn.Module) -> torch.nn.Module:
    """A sharded student with its adapters as one model on rank 0, without weights on the others. On all ranks."""
    from peft import get_peft_model

    base = base_causal_lm(student)
    with torch.device("meta"):
        whole = type(base)(copy.deepcopy(base.config))
        whole.generation_config = copy.deepcopy(base.generation_config)
        twin = get_peft_model(whole, student.peft_config["default"])  # type: ignore[index, arg-type]
    reshard(student)
    tensors = {}
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    for name, tensor in chain(student.named_parameters(), student.named_buffers()):
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if first:
            tensors[name] = tensor.detach().cpu()
    if first:
        twin.load_state_dict(tensors, strict=False, assign=True)
        whole.tie_weights()
    return twin


def check_replaceable(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier export.

    Raises:
        ValueError: it is a file, or holds what no export wrote; names the first such entry.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file, an export is a folder")
    try:
        known = {*json.loads((folder / _MANIFEST).read_text())["files"], _MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    foreign = sorted({path.name for path in folder.iterdir()} - known)
    if foreign:
        raise ValueError(f"{folder}: holds {foreign[0]}, which no export wrote: move it away or name another folder")


class Trained(NamedTuple):
    """A student out of a checkpoint."""

    model: torch.nn.Module  # a causal LM, in a peft wrapper or not
    name: str  # folder or hub name that training began with
    step: int
    kwargs: dict[str, str]  # which of its files were read: `gguf_file`, `revision`, …


def _which_files(hparams: Mapping[str, Any]) -> dict[str, str]:
    """What a checkpoint may say about reading its student. Nothing else: `weights_only`, say, is not its to choose."""
    given = hparams.get("student_kwargs")
    if not isinstance(given, Mapping):
        return {}
    return {name: str(given[name]) for name in ("gguf_file", "revision", "subfolder", "variant") if name in given}


def load_student(ckpt: str | Path, student: str | None = None, *, trust_remote_code: bool = False) -> Trained:
    """The student of a checkpoint of any module of this kit, built from its hyper-parameters. No teacher is loaded.

    Args:
        ckpt: the checkpoint, a file or a sharded folder; read as tensors and plain values, no code in it runs.
        student: what training began with; None = what the hyper-parameters say.
        trust_remote_code: run code that comes with the student.

    Raises:
        ValueError: no such file, no checkpoint of this kit, or weights that do not fit the student.
    """
    content = read_checkpoint(ckpt, optimizers=False)
    hparams, state, step = content["hyper_parameters"], content["state_dict"], int(content["global_step"])
    weights = {key.removeprefix("student."): v for key, v in state.items() if key.startswith("student.")}
    if not weights:
        raise ValueError(f"{ckpt}: holds no weights of a student")
    name = student or hparams.get("student")
    if not isinstance(name, str):
        raise ValueError(f"{ckpt}: does not say which model was trained: name it (student)")
    model: torch.nn.Module = load_causal_lm(
        name,
        dtype=hparams.get("dtype") or "auto",
        trust_remote_code=trust_remote_code,
        model_kwargs=(kwargs := {} if student else _which_files(hparams)),
    )
    if hparams.get("lora"):
        model = add_lora(model, LoRA(**dict(hparams["lora"])))  # type: ignore[arg-type]
    own = model.state_dict()
    needed = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    wrong = sorted(weights.keys() - own.keys()) or sorted(needed - weights.keys())
    wrong = wrong or [key for key, value in weights.items() if own[key].shape != value.shape]
    if wrong:
        raise ValueError(f"{ckpt}: does not fit the student {name!r}, first at {wrong[0]}")
    model.load_state_dict(weights, strict=False)
    return Trained(model, name, step, kwargs)
