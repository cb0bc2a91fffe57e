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


def map_columns(folder: Path, count: int, dtypes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The columns, mapped from their files. Raises OSError, or ValueError where they are not as they were written."""
    found = {}
    for name, dtype in dtypes.items():
        try:
            column = np.load(folder / f"{name}.npy", mmap_mode="r") if count else np.empty(0, dtype)
        except OSError:
            raise
        except Exception as error:  # NumPy parses the header as Python, with all that may be wrong with that
            raise ValueError(f"column {name} cannot be read: {error}") from None
        if column.ndim != 1 or column.dtype != dtype:
            raise ValueError(f"column {name} is {column.dtype} {column.shape}, expected {np.dtype(dtype)} [samples]")
        if len(column) != count:
            raise ValueError(f"{len(column)} samples, the summary says {count}")
        found[name] = np.asarray(column)
    return found


def shared_columns(
    folder: Path, count: int, blocks: Callable[[], Iterable[Mapping[str, np.ndarray]]], dtypes: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The columns of a folder, which whoever comes first writes. Raises OSError and ValueError."""
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.{uuid4().hex}.tmp")
        try:
            write_columns(partial, blocks(), dtypes)
            with suppress(OSError):  # another process may have been faster
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return map_columns(folder, count, dtypes)


def every(test: Callable[..., Any], *columns: np.ndarray) -> bool:
    """Whether a test holds for all samples, without a copy of whole columns."""
    count = len(columns[0])
    return all(
        bool(np.all(test(*(column[start : start + _BLOCK] for column in columns)))) for start in range(0, count, _BLOCK)
    )
