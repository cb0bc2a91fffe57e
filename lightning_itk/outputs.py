"""Outputs that never replace what somebody else wrote."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from lightning_itk.files import atomic_write


def note_output(path: str | Path) -> None:
    """Note beside a finished output, in `.NAME.itk.json`, that this kit wrote it: its size and SHA-256.

    Raises:
        ValueError: the note cannot be written.
    """
    with atomic_write(_note_of(Path(path))) as file:
        file.write(json.dumps(_digest(Path(path))).encode() + b"\n")


def check_noted(path: Path) -> None:
    """Refuse a file that `note_output` did not note, or that was changed since. Raises ValueError."""
    try:
        noted = json.loads(_note_of(path).read_text())
    except (OSError, ValueError):
        noted = None
    if noted != _digest(path):
        raise ValueError(f"{path}: no run of this kit wrote it, or it was changed since: move it away or name another")


def check_output(path: str | Path, overwrite: bool = False, known: Callable[[Path], object] = check_noted) -> None:
    """Refuse, before any work, an output file that cannot be written or where something stands already.

    Args:
        path: the file that is to be written.
        overwrite: let it replace a file that `known` accepts.
        known: raises ValueError for a file that no earlier run wrote.

    Raises:
        ValueError: one line with the reason.
    """
    path = Path(path)
    if path.is_symlink():
        raise ValueError(f"{path}: is a link, name the file itself")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a file to write")
    if not path.exists():
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise ValueError(f"{path}: cannot be written: {above} is {'read-only' if above.is_dir() else 'a file'}")
        return
    if not path.is_file():
        raise ValueError(f"{path}: is no ordinary file")
    if not overwrite:
        raise ValueError(f"{path}: exists already; overwrite (true) replaces what an earlier run wrote")
    known(path)


def _note_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.itk.json")


def _digest(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}
