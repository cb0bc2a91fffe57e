"""What is known of every sample of a cache, one .npy file per column: mapped, so that all ranks of a node share it."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np

_BLOCK = 1 << 20  # samples that are looked at together


def write_columns(folder: Path, blocks: Iterable[Mapping[str, np.ndarray]], dtypes: Mapping[str, Any]) -> None:
    """Write columns block by block: only one block is ever in memory. Raises OSError."""
    folder.mkdir()
    count = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.npy").open("wb")) for name in dtypes}
        for name, file in files.items():
            _write_header(file, dtypes[name], 0)
        for block in blocks:
            for name, file in files.items():
                file.write(np.ascontiguousarray(block[name], dtypes[name]).data)
            count += len(next(iter(block.values())))
        for name, file in files.items():
            file.seek(0)
            _write_header(file, dtypes[name], count)  # of the same length: NumPy leaves room for the first axis to grow


def _write_header(file: BinaryIO, dtype: Any, count: int) -> None:
    about = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, about)


def map_columns(folder: Path, count: int | None, dtypes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The columns, mapped from their files. Raises OSError, or ValueError where they are not as they were written.

    Args:
        folder: where they are.
        count: their samples; None = each is as long as it is.
        dtypes: what each holds.
    """
    found = {}
    for name, dtype in dtypes.items():
        path = folder / f"{name}.npy"
        try:
            column = np.empty(0, dtype) if count == 0 else np.load(path, mmap_mode="r" if _holds(path) else None)
        except OSError:
            raise
        except Exception as error:  # NumPy parses the header as Python, with all that may be wrong with that
            raise ValueError(f"column {name} cannot be read: {error}") from None
        if column.ndim != 1 or column.dtype != dtype:
            raise ValueError(f"column {name} is {column.dtype} {column.shape}, expected {np.dtype(dtype)} [samples]")
        if count is not None and len(column) != count:
            raise ValueError(f"{len(column)} samples, the summary says {count}")
        found[name] = np.asarray(column)
    return found


def _holds(path: Path) -> bool:
    """Whether there is anything behind the header: of nothing no map can be made."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        return np.lib.format.read_array_header_1_0(file)[0] != (0,)


def shared_columns(
    folder: Path, count: int, blocks: Callable[[], Iterable[Mapping[str, np.ndarray]]], dtypes: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The columns of a folder, which whoever comes first writes. Raises OSError and ValueError."""
    _once(folder, lambda partial: write_columns(partial, blocks(), dtypes))
    return map_columns(folder, count, dtypes)


def shared_arrays(
    folder: Path, make: Callable[[], Mapping[str, np.ndarray]], dtypes: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The same for arrays of any length, each made whole."""

    def write(partial: Path) -> None:
        made = make()
        partial.mkdir()
        for name, dtype in dtypes.items():
            np.save(partial / f"{name}.npy", made[name].astype(dtype, copy=False))

    _once(folder, write)
    return map_columns(folder, None, dtypes)


def _once(folder: Path, write: Callable[[Path], None]) -> None:
    """A folder that is there, complete."""
    if folder.exists():
        return
    partial = folder.with_name(f".{folder.name}.{uuid4().hex}.tmp")
    try:
        write(partial)
        with suppress(OSError):  # another process may have been faster
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def every(test: Callable[..., Any], *columns: np.ndarray) -> bool:
    """Whether a test holds for all samples, without a copy of whole columns."""
    count = len(columns[0])
    return all(
        bool(np.all(test(*(column[start : start + _BLOCK] for column in columns)))) for start in range(0, count, _BLOCK)
    )
