"""Checkpoint folders that several ranks wrote together, read without running any code that they may hold."""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

_EXTRA = "meta.pt"  # what Lightning writes beside the shards: all but weights and optimizers
_ALLOWED = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
}

_BROKEN = (OSError, EOFError, LookupError, AttributeError, TypeError, ValueError, RuntimeError, pickle.PickleError)


def is_sharded(path: str | Path) -> bool:
    """Whether this is a checkpoint folder, complete: its description and what lies beside the shards come last."""
    return (Path(path) / ".metadata").is_file() and (Path(path) / _EXTRA).is_file()


class _PlainUnpickler(pickle.Unpickler):
    """Knows only what a description of shards is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def check_sharded(folder: str | Path) -> Metadata:
    """Read the description of the shards, and every value in them that is no tensor, as plain data. torch unpickles
    both without a look, so ask before a folder is given to it.

    Raises:
        ValueError: no complete checkpoint folder, or it holds more than plain data.
    """
    folder = Path(folder)
    if not is_sharded(folder):
        raise ValueError(f"{folder}: is no complete checkpoint folder")
    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = _PlainUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError("its description is of another kind")
        for index, stored in (metadata.storage_data or {}).items():
            if not isinstance(metadata.state_dict_metadata[index.fqn], TensorStorageMetadata):
                with (folder / stored.relative_path).open("rb") as file:
                    file.seek(stored.offset)
                    torch.load(io.BytesIO(file.read(stored.length)), weights_only=True)
    except _BROKEN as error:
        raise ValueError(f"{folder}: is no checkpoint of this kit ({type(error).__name__})") from error
    return metadata


def read_sharded(folder: str | Path, *, optimizers: bool = True) -> dict[str, Any]:
    """A checkpoint folder as one checkpoint, as a single process would have written it.

    It is read into this process's memory, the optimizers' states (twice the weights) only where they are asked for.

    Raises:
        ValueError: see `check_sharded`.
    """
    metadata = check_sharded(folder)
    flat: dict[str, Any] = {}
    for name, stored in metadata.state_dict_metadata.items():
        if not optimizers and metadata.planner_data[name][0] != "state_dict":
            continue
        flat[name] = None
        if isinstance(stored, TensorStorageMetadata):
            flat[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what was asked for
        dcp.load(flat, storage_reader=dcp.FileSystemReader(folder), planner=dcp.DefaultLoadPlanner(), no_dist=True)
    content: dict[Any, Any] = {}
    for name, value in flat.items():
        *parents, last = metadata.planner_data[name]
        place = content
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
    checkpoint = torch.load(Path(folder) / _EXTRA, map_location="cpu", weights_only=True)
    checkpoint["state_dict"] = content.pop("state_dict")
    if not optimizers:
        return checkpoint
    checkpoint["optimizer_states"] = [_numbered(content[f"optimizer_{number}"]) for number in range(len(content))]
    return checkpoint


def _numbered(optimizer: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer by parameters' numbers, as torch has it, from that by their names."""
    groups = [optimizer["param_groups"][number] for number in range(len(optimizer["param_groups"]))]
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group["params"])}
    return {
        "state": {numbers[name]: state for name, state in optimizer.get("state", {}).items()},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
    }
