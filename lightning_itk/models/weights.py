"""Where a model's weights are, read a few at a time: in a checkpoint, in files, in a model that may be sharded."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from lightning_itk.models.checkpoint import read_checkpoint, shapes
from lightning_itk.models.precision import reshard

_MAPPED = 2**28  # bytes of a checkpoint file that are read before it is mapped anew


class Weights:
    """Some tensors by name. Read ones must not be changed."""

    def __contains__(self, name: object) -> bool:
        raise NotImplementedError

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, which must be among those that are `in` here."""
        raise NotImplementedError

    def stored(self, name: str) -> Tensor | None:
        """The tensor that files of `save_pretrained` hold under this name, where it is at hand in that form."""
        return None


class CheckpointWeights(Weights):
    """The tensors of a checkpoint that begin with a prefix, without it; only those that are read reach the memory.

    Args:
        path: a checkpoint file or folder.
        prefix: of the names.

    Raises:
        ValueError: see `read_checkpoint`; or another checkpoint took the name while this one was read.
    """

    def __init__(self, path: str | Path, prefix: str) -> None:
        self.path, self.prefix = Path(path), prefix
        self._opened, self._bytes = _identity(self.path), 0
        content = read_checkpoint(path, lazy=True)
        self._state: Mapping[str, Tensor] = content["state_dict"]
        self.hyper_parameters: dict[str, Any] = content["hyper_parameters"]
        self.step = int(content["global_step"])
        found = shapes(self._state)
        self.shapes = {name.removeprefix(prefix): shape for name, shape in found.items() if name.startswith(prefix)}

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        if _identity(self.path) != self._opened:
            raise ValueError(f"{self.path}: another checkpoint took its place while it was read")
        if self._bytes > _MAPPED:  # what a mapped file was read for stays in memory as long as the mapping
            self._state, self._bytes = read_checkpoint(self.path, lazy=True)["state_dict"], 0
        found = {name: self._state[self.prefix + name] for name in names}
        self._bytes += sum(tensor.nbytes for tensor in found.values())
        return found


def _identity(path: Path) -> tuple[int, ...]:
    """What tells a checkpoint from another of its name."""
    try:
        found = (path / ".metadata" if path.is_dir() else path).stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


class ModelWeights(Weights):
    """The weights of a model in memory. Sharded ones are gathered on rank 0, where all ranks read them at once; the
    others get tensors on the meta device."""

    def __init__(self, model: torch.nn.Module) -> None:
        reshard(model)
        self.tensors = dict(model.named_parameters(remove_duplicate=False))
        self.tensors |= dict(model.named_buffers(remove_duplicate=False))  # type: ignore[arg-type]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: _gathered(self.tensors[name].detach()) for name in names}


def _gathered(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()
    return whole.cpu() if torch.distributed.get_rank() == 0 else whole.to("meta")


class ModelFiles(Weights):
    """The weights of a folder or hub name in safetensors, by the names that they have there.

    Raises:
        ValueError: it has no such files.
    """

    def __init__(self, name: str) -> None:
        quiet: Any = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        if (single := cached_file(name, SAFE_WEIGHTS_NAME, **quiet)) is not None:
            files = [single]
        elif (index := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **quiet)) is not None:
            files = get_checkpoint_shard_files(name, index)[0]
        else:
            raise ValueError(f"{name}: holds no safetensors")
        self.files: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    self.files[key], self.shapes[key] = path, tuple(file.get_slice(key).get_shape())

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._tensor(name) for name in names}

    def _tensor(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)
