"""Files and folders that appear complete or not at all, and go the same way."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write under a temporary name, which takes the name `path` once it is complete and on disk.

    Raises:
        ValueError: it cannot be written (one line with the reason).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def take_place(new: Path, path: Path) -> None:
    """Give something complete the name `path`, in place of what has it now, so that a kill leaves one of them whole.

    A file takes the name at once. Folders cannot: for a moment the old one is called .STEM.previous, with its suffix.
    """
    if not new.is_dir() and (path.is_symlink() or not path.is_dir()):
        new.replace(path)
        return
    previous = path.with_name(f".{path.stem}.previous{path.suffix}")
    if path.exists():
        remove(previous)  # a kill left it
        path.rename(previous)
    new.rename(path)
    remove(previous)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there. A folder loses its name first: no half of it is ever found there."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
