"""Checkpoint folders that several ranks wrote together, read without running any code that they may hold."""

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
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


class _Reader(dcp.FileSystemReader):
    """Goes by a description that was checked: torch would unpickle it again, without a look."""

    def __init__(self, folder: str | Path, description: Metadata) -> None:
        super().__init__(folder)
        self._description = description

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._description


def _load(flat: dict[str, Any], folder: str | Path, description: Metadata) -> dict[str, Any]:
    """Read the values of these names; tensors into those that are there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what was asked for
        try:
            dcp.load(flat, storage_reader=_Reader(folder, description), planner=dcp.DefaultLoadPlanner(), no_dist=True)
        except (*_BROKEN, dcp.CheckpointException) as error:  # torch's own is no Exception
            raise ValueError(f"{folder}: {next(iter(flat), 'it')} cannot be read ({type(error).__name__})") from error
    return flat


class ShardedTensors(Mapping[str, torch.Tensor]):
    """The tensors of a model in a checkpoint folder, each read when it is asked for.

    Raises:
        ValueError: see `check_sharded`; or a shard is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self._description = Path(folder), check_sharded(folder)
        self._stored: dict[str, str] = {}  # a tensor's name -> its name in the description
        for name, (kind, *rest) in self._description.planner_data.items():
            if kind == "state_dict" and isinstance(self._of(name), TensorStorageMetadata):
                self._stored[".".join(map(str, rest))] = name
        self.shapes = {name: tuple(self._of(stored).size) for name, stored in self._stored.items()}

    def _of(self, name: str) -> Any:
        return self._description.state_dict_metadata[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        tensor = torch.empty(self.shapes[name], dtype=self._of(stored).properties.dtype)
        return _load({stored: tensor}, self.folder, self._description)[stored]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def open_sharded(folder: str | Path) -> dict[str, Any]:
    """A checkpoint folder as one checkpoint without optimizers, whose weights (`ShardedTensors`) are not yet read.

    Raises:
        ValueError: see `check_sharded`.
    """
    tensors = ShardedTensors(folder)
    return torch.load(Path(folder) / _EXTRA, map_location="cpu", weights_only=True) | {"state_dict": tensors}


def read_sharded(folder: str | Path) -> dict[str, Any]:
    """A checkpoint folder as one checkpoint, as a single process would have written it, in this process's memory.

    Raises:
        ValueError: see `check_sharded`.
    """
    metadata = check_sharded(folder)
    flat: dict[str, Any] = {}
    for name, stored in metadata.state_dict_metadata.items():
        flat[name] = None
        if isinstance(stored, TensorStorageMetadata):
            flat[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    content: dict[Any, Any] = {}
    for name, value in _load(flat, folder, metadata).items():
        *parents, last = metadata.planner_data[name]
        place = content
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
    checkpoint = torch.load(Path(folder) / _EXTRA, map_location="cpu", weights_only=True)
    checkpoint["state_dict"] = content.pop("state_dict")
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
