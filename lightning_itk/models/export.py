"""A trained student as a folder that `AutoModelForCausalLM.from_pretrained` reads, also out of a checkpoint."""

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lightning_itk.files import take_place
from lightning_itk.models.adapters import BaseFiles, MergedAdapters, empty_twin, merged_twin
from lightning_itk.models.loading import DType, LoRA, add_lora, load_causal_lm
from lightning_itk.models.saved import SavedModel, empty
from lightning_itk.models.weights import CheckpointWeights, ModelWeights, Weights

MAX_SHARD_SIZE = "50GB"  # as in transformers
_MANIFEST = "itk_export.json"  # which files of a folder an export wrote


def export(
    student: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    dtype: DType = "auto",
    max_shard_size: str = MAX_SHARD_SIZE,
    write: bool = True,
) -> None:
    """Save weights (safetensors, adapters merged), configuration and tokenizer with its chat template.

    The folder appears complete or not at all. An earlier export is replaced, and nothing else: a file that no export
    wrote is never touched. The student is not changed. Beside it, one file's weights are in memory at a time.

    Args:
        student: a causal LM, in a peft wrapper or not, sharded by FSDP2 or not. Sharded ones must be exported on all
            ranks at once.
        dtype: of the saved weights; "auto" = as they are.
        max_shard_size: of a file of weights, such as "5GB".
        write: False only takes part in gathering the weights (all ranks but one).

    Raises:
        ValueError: the folder cannot be written, or holds what no export wrote (one line with the reason).
    """
    if not write and not any(isinstance(module, FSDPModule) for module in student.modules()):
        return
    weights: Weights = ModelWeights(student)
    if hasattr(student, "merge_and_unload"):
        twin = empty_twin(student)
        student, weights = merged_twin(twin), MergedAdapters(twin, weights)
    assert isinstance(student, PreTrainedModel)
    write_folder(SavedModel(student), weights, tokenizer, folder, dtype, max_shard_size, write=write)


def write_folder(
    saved: SavedModel,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    dtype: DType = "auto",
    max_shard_size: str = MAX_SHARD_SIZE,
    *,
    write: bool = True,
) -> None:
    """What `export` says, of a model whose weights are anywhere.

    Args:
        saved: the model, which may be on the meta device.
        weights: its weights, read a few at a time.
        write: False only reads the weights, in the same order.
    """
    if not write:
        _write_weights(saved, weights, None, dtype, max_shard_size)
        return
    folder = Path(folder).resolve()  # the target of a link, which stays
    check_replaceable(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written: {error.strerror}") from error
    try:
        saved.model.save_pretrained(temporary, state_dict={})  # all but the weights
        _write_weights(saved, weights, temporary, dtype, max_shard_size)
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


def _write_weights(saved: SavedModel, weights: Weights, folder: Path | None, dtype: DType, max_shard_size: str) -> None:
    """The files of weights and their index, one file in memory at a time; without a folder, only read the weights."""
    wanted = {n: getattr(torch, dtype) if dtype != "auto" and t.is_floating_point() else t.dtype
              for n, t in saved.tensors.items()}  # fmt: skip
    split = split_weights({name: empty(t, wanted[name]) for name, t in saved.tensors.items()}, max_shard_size)
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name, tensor in saved.make(weights, names):
            if folder is not None:
                tensors[name] = tensor.to(wanted[name]).contiguous()
        if folder is not None:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if folder is not None and split.is_sharded:
        facts = {"total_parameters": saved.model.num_parameters(), **split.metadata}
        index = {"metadata": facts, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def split_weights(tensors: dict[str, torch.Tensor], max_shard_size: str) -> StateDictSplit:
    """Which file gets which tensors.

    Raises:
        ValueError: no size of a file.
    """
    try:
        return split_torch_state_dict_into_shards(
            tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ValueError(f"max_shard_size: expected a size such as 5GB, found {max_shard_size!r}") from error


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
    """A student out of a checkpoint, whose weights are still there."""

    saved: SavedModel  # of a model on the meta device
    weights: Weights
    name: str  # folder or hub name that training began with
    step: int
    note: str  # why more of it than a few weights must be in memory; empty where it need not
    kwargs: dict[str, str]  # which of its files were read: `gguf_file`, `revision`, …


def _which_files(hparams: Mapping[str, Any]) -> dict[str, str]:
    """What a checkpoint may say about reading its student. Nothing else: `weights_only`, say, is not its to choose."""
    given = hparams.get("student_kwargs")
    if not isinstance(given, Mapping):
        return {}
    return {name: str(given[name]) for name in ("gguf_file", "revision", "subfolder", "variant") if name in given}


def open_student(ckpt: str | Path, student: str | None = None, *, trust_remote_code: bool = False) -> Trained:
    """The student of a checkpoint of any module of this kit, its adapters merged, without its weights: `write_folder`
    reads them a few at a time. No teacher is loaded.

    Args:
        ckpt: the checkpoint, a file or a sharded folder; read as tensors and plain values, no code in it runs.
        student: what training began with; None = what the hyper-parameters say.
        trust_remote_code: run code that comes with the student.

    Raises:
        ValueError: no such file, no checkpoint of this kit, or weights that do not fit the student.
    """
    trained = CheckpointWeights(ckpt, "student.")
    hparams = trained.hyper_parameters
    if not trained.shapes:
        raise ValueError(f"{ckpt}: holds no weights of a student")
    name = student or hparams.get("student")
    if not isinstance(name, str):
        raise ValueError(f"{ckpt}: does not say which model was trained: name it (student)")
    kwargs = {} if student else _which_files(hparams)
    load = partial(load_causal_lm, name, dtype=hparams.get("dtype") or "auto", trust_remote_code=trust_remote_code)
    base = load(model_kwargs={**kwargs, "device_map": "meta"})
    twin: torch.nn.Module = base
    if hparams.get("lora"):
        with torch.device("meta"):
            twin = add_lora(copy.deepcopy(base), LoRA(**dict(hparams["lora"])))
    own = {key: tuple(tensor.shape) for key, tensor in twin.state_dict().items()}
    needed = {key for key, parameter in twin.named_parameters() if parameter.requires_grad}
    wrong = sorted(trained.shapes.keys() - own.keys()) or sorted(needed - trained.shapes.keys())
    wrong = wrong or [key for key, shape in trained.shapes.items() if own[key] != shape]
    if wrong:
        raise ValueError(f"{ckpt}: does not fit the student {name!r}, first at {wrong[0]}")
    if twin is base:
        return Trained(saved := SavedModel(base), trained, name, trained.step, _note(saved), kwargs)
    saved = SavedModel(merged_twin(twin))
    merged = MergedAdapters(twin, trained)
    try:
        if kwargs:
            raise ValueError(f"it is read by {', '.join(kwargs)}")
        merged.base, note = BaseFiles(name, saved, merged), _note(saved)
    except ValueError as error:
        merged.base, note = ModelWeights(load(model_kwargs=kwargs)), f"the base model is read as a whole: {error}"
    return Trained(saved, merged, name, trained.step, note, kwargs)


def _note(saved: SavedModel) -> str:
    return f"{type(saved.model).__name__} is turned into the form of its files as a whole" if saved.whole else ""
