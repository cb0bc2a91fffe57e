"""The shards of a cached teacher: safetensors files, memory-mapped, whose rows are found by what a sample holds.

A shard holds whole samples one after the other: `identity` [samples, 16], the sums `rows` [samples + 1] and `tokens`
[samples + 1], and columns of values, by response row (`states`, or `ids`, `log_probs`, `nll`) or by token (`q.3`,
`k.3`).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_itk.cached.manifest import HEAD, Manifest, StoredFile, shard_name
from lightning_itk.files import atomic_write

_INDEX = {"identity", "rows", "tokens"}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file that appears complete or not at all. The same tensors are the same bytes."""
    with atomic_write(path) as file:
        file.write(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def write_shard(
    folder: Path,
    number: int,
    identities: Sequence[bytes],
    columns: Mapping[str, Sequence[Tensor]],
    tokens: Sequence[int],
) -> None:
    """Write one shard.

    Args:
        identities: of its samples, see `batch.identity`.
        columns: values of every sample [its response rows or tokens, ...], by name.
        tokens: how many tokens each sample has.
    """
    by_row = next(values for name, values in columns.items() if not is_by_token(name))
    index = {
        "identity": torch.frombuffer(bytearray(b"".join(identities)), dtype=torch.uint8).view(-1, 16),
        "rows": torch.tensor([0, *map(len, by_row)]).cumsum(0),
        "tokens": torch.tensor([0, *tokens]).cumsum(0),
    }
    write_tensors(folder / shard_name(number), index | {name: joined(v) for name, v in columns.items()})


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts of a column one after the other. bf16 autocast would look at their dtypes, and refuse fp16."""
    with torch.autocast("cpu", enabled=False):
        return torch.cat(list(parts))


def read_identities(path: Path) -> list[bytes]:
    """Whose samples a shard holds. Raises ValueError for anything but a shard."""
    with opened(path) as shard:
        return [row.tobytes() for row in shard.get_tensor("identity").numpy()]


def index_hash(shards: Iterable[Any]) -> str:
    """A hash of which samples opened shards hold, where, and in which columns; not of the values."""
    found = hashlib.sha256()
    for shard in shards:
        for name in sorted(shard.keys()):
            column = shard.get_slice(name)
            found.update(f"{name} {column.get_dtype()} {column.get_shape()}".encode())
            if name in _INDEX:
                found.update(shard.get_tensor(name).numpy().tobytes())
    return found.hexdigest()


class Place(NamedTuple):
    """Where a sample is stored."""

    shard: int
    rows: slice
    tokens: slice


class Shards:
    """The stored samples of a folder. Only their index is in memory; what is read comes from mapped files.

    Raises:
        ValueError: no complete folder of a cached teacher, or a damaged one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.manifest = Manifest.read(self.folder)
        self._open = [opened(self.folder / file.name) for file in self.manifest.shards]
        names, shards, rows, tokens = [], [], [], []
        for number, shard in enumerate(self._open):
            try:
                found = shard.get_tensor("identity").contiguous().numpy().view("S16")[:, 0]
                bounds = [shard.get_tensor(name).numpy() for name in ("rows", "tokens")]
                self._check(shard, len(found), *bounds)
            except (SafetensorError, ValueError, IndexError, TypeError) as error:
                path = self.folder / self.manifest.shards[number].name
                raise ValueError(f"{path}: is no shard of a cached teacher, or is damaged") from error
            names.append(found)
            shards.append(np.full(len(found), number))
            rows.append(np.stack([bounds[0][:-1], bounds[0][1:]], 1))
            tokens.append(np.stack([bounds[1][:-1], bounds[1][1:]], 1))
        if index_hash(self._open) != self.manifest.index:
            raise ValueError(f"{self.folder}: the samples of its shards are not those of its manifest")
        self._names = np.concatenate(names) if names else np.empty(0, "S16")
        order = np.argsort(self._names)
        self._names = self._names[order]
        self._shard, self._rows, self._tokens = (np.concatenate(part)[order] for part in (shards, rows, tokens))

    def _check(self, shard: Any, samples: int, rows: np.ndarray, tokens: np.ndarray) -> None:
        for bounds in (rows, tokens):
            if len(bounds) != samples + 1 or bounds[0] != 0 or (np.diff(bounds) < 0).any():
                raise ValueError("its samples are out of order")
        for name in set(shard.keys()) - _INDEX:
            if shard.get_slice(name).get_shape()[0] != (tokens if is_by_token(name) else rows)[-1]:
                raise ValueError(f"{name} has another length than its samples")

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.folder,)  # a copy maps the files itself

    def missing(self, identities: np.ndarray) -> np.ndarray:
        """Which samples [n] (S16) are not stored, as a mask [n]."""
        if not len(self._names):
            return np.ones(len(identities), bool)
        at = np.searchsorted(self._names, identities).clip(max=len(self._names) - 1)
        return self._names[at] != identities

    def places(self, identities: np.ndarray) -> list[Place]:
        """Where samples are stored, all of which are."""
        found = []
        for at in np.searchsorted(self._names, identities):
            rows, tokens = (slice(*map(int, bounds[at])) for bounds in (self._rows, self._tokens))
            found.append(Place(int(self._shard[at]), rows, tokens))
        return found

    def read(self, name: str, places: Sequence[Place]) -> list[Tensor]:
        """One column of samples, each [its rows or tokens, ...]. Views of the files: copy what is to be kept."""
        return [
            self._open[place.shard].get_slice(name)[place.tokens if is_by_token(name) else place.rows]
            for place in places
        ]

    def empty(self, name: str) -> Tensor:
        """A column of no samples."""
        return self._open[0].get_slice(name)[:0]

    def head(self) -> dict[str, Tensor]:
        """The teacher's output layer: weight, and bias where it has one. Raises ValueError where it is damaged."""
        if StoredFile.of(self.folder / HEAD) not in self.manifest.files:
            raise ValueError(f"{self.folder / HEAD}: is damaged, it is not what was written")
        with opened(self.folder / HEAD) as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def is_by_token(name: str) -> bool:
    """Whether a column has a value for every token; else for every response row."""
    return name.startswith(("q.", "k."))


def opened(path: Path) -> Any:
    """A safetensors file, mapped. Raises ValueError where it is none."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is no safetensors file, or is damaged") from error
