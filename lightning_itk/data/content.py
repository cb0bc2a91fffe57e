"""What a source holds, as a hash: read once per machine and change, not by every rank of every run."""

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from lightning_itk.data.locations import DataFile
from lightning_itk.data.sources import Source, load_hub
from lightning_itk.files import atomic_write

_SETTLED = 2.0  # seconds: file systems may date two changes within that time alike
# What file systems call a hash of what a file holds, the plainest first: Google, Azure, Hugging Face, S3.
_CHECKSUMS = ("sha256", "md5Hash", "content_md5", "blob_id", "checksum", "ETag", "etag")


def content_hash(source: Source, notes: Path | None = None) -> str:
    """A hash of what the source holds, whatever its files are called.

    Of a file elsewhere it is its size and the checksum that its file system has; only where there is none is it read.

    Args:
        source: where the records come from.
        notes: folder of earlier hashes, each with its file's size, times and inode, as git's index has them. A file
            that is as it was noted is not read; None = read it.

    Raises:
        DataError: no such file or data set, or one that cannot be read.
    """
    if not source.is_file:
        return _hash(load_hub(source)._fingerprint.encode())
    files = source.files()
    hashes = [_file_hash(file, notes) for file in files]
    if len(files) == 1:
        return hashes[0]
    return _hash(json.dumps([[file.kind, found] for file, found in zip(files, hashes, strict=True)]).encode())


def local_hash(path: str, notes: Path | None = None) -> str:
    """The same of any file of this machine. Raises DataError."""
    return _file_hash(DataFile(str(Path(path).absolute()), Path(path).name), notes)


def _file_hash(file: DataFile, notes: Path | None) -> str:
    if file.file_system is not None and (known := _checksum(file)):
        return _hash(json.dumps([file.size, known]).encode())
    try:
        begun = time.time()
        before, changed = _state(file)
        place = file.path if file.file_system is None else f"{file.file_system.protocol} {file.path}"
        note = notes / f"{_hash(place.encode())}.json" if notes is not None and before else None
        if note is not None:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                noted = json.loads(note.read_text())
                if noted["state"] == before:
                    return str(noted["hash"])
        with file.open() as opened:
            reader: Any = opened
            found = hashlib.file_digest(reader, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        if note is not None and begun - changed > _SETTLED and _state(file)[0] == before:
            with contextlib.suppress(ValueError), atomic_write(note) as out:  # whoever cannot note it reads it again
                out.write(json.dumps({"file": file.name, "state": before, "hash": found}).encode())
    except Exception as error:  # every file system raises kinds of its own
        raise file.broken(error) from None
    return found


def _checksum(file: DataFile) -> Any:
    """What the file system says of what the file holds; None if it says nothing."""
    try:
        info = file.file_system.info(file.path)
        lfs = info.get("lfs")
        known = lfs.get("sha256") if isinstance(lfs, Mapping) else None
        known = known or next((info[name] for name in _CHECKSUMS if info.get(name)), None)
        if known is None and type(file.file_system).checksum is not AbstractFileSystem.checksum:
            known = file.file_system.checksum(file.path)  # the plain one is of the name and times
    except Exception as error:
        raise file.broken(error) from None
    return str(known).removeprefix("W/") if known is not None else None


def _state(file: DataFile) -> tuple[list[Any], float]:
    """What changes when a file does, and when it last did; nothing where the file system does not say."""
    if file.file_system is None:
        path = Path(file.path).resolve()
        stat = path.stat()
        times = max(stat.st_mtime, stat.st_ctime)
        return [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino], times
    try:
        times = file.file_system.modified(file.path).timestamp()
    except (NotImplementedError, KeyError, AttributeError, TypeError):
        return [], 0.0
    return [file.file_system.info(file.path).get("size"), times], times


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
