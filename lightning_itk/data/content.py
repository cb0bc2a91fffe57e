"""What a source holds, as a hash: read once per machine and change, not by every rank of every run."""

import contextlib
import hashlib
import json
import time
from pathlib import Path

from lightning_itk.data.sources import Source, load_hub
from lightning_itk.files import atomic_write

_SETTLED = 2.0  # seconds: file systems may date two changes within that time alike


def content_hash(source: Source, notes: Path | None = None) -> str:
    """A hash of what the source holds, whatever its file is called.

    Args:
        source: where the records come from.
        notes: folder of earlier hashes, each with its file's size, times and inode, as git's index has them. A file
            that is as it was noted is not read; None = read it.

    Raises:
        DataError: no such file or data set.
    """
    if not source.is_file:
        return hashlib.blake2b(load_hub(source)._fingerprint.encode(), digest_size=16).hexdigest()
    path = source.checked_path()
    before = _state(path)
    note = notes / f"{_hash(str(path.resolve()).encode())}.json" if notes is not None else None
    if note is not None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(note.read_text())
            if known["state"] == before:
                return str(known["hash"])
    begun = time.time()
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    settled = begun - max(path.stat().st_mtime, path.stat().st_ctime) > _SETTLED
    if note is not None and settled and _state(path) == before:
        with contextlib.suppress(ValueError), atomic_write(note) as out:  # whoever cannot note it reads it again
            out.write(json.dumps({"file": str(path.resolve()), "state": before, "hash": found}).encode())
    return found


def _state(path: Path) -> list[int]:
    """What changes when a file does."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
