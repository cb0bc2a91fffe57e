"""Where data files lie: on a disk or behind a URL of fsspec, alone, in a folder, or matched by a glob."""

import gzip
import io
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import pyarrow as pa

from lightning_itk.data.errors import DataError

KINDS = (".json", ".jsonl", ".ndjson", ".parquet")
SUFFIXES = (*KINDS, *(kind + packed for packed in (".gz", ".zst") for kind in KINDS[:3]))
_GLOB = re.compile(r"[*?\[]")
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"(?<=\w)(://[^\s?'\"]+)\?[^\s'\"]*")


def without_keys(text: str) -> str:
    """A path, or a message about one, without what gives access to it: logins and queries of URLs."""
    return _QUERY.sub(r"\1", _LOGIN.sub("", text))


def is_location(path: str) -> bool:
    """Whether this names files, rather than a data set of the hub."""
    if path.startswith((".", "/", "~")) or "://" in path or path.endswith(SUFFIXES):
        return True
    return Path(path).exists() or _GLOB.search(path) is not None


@dataclass(frozen=True)
class DataFile:
    """A file of records.

    Attributes:
        path: as its file system calls it.
        name: how messages call it: its place below the folder or glob that it was found by, else its last part.
        file_system: of fsspec; None = the machine's own.
        size: in bytes; None = its file system does not say.
    """

    path: str
    name: str
    file_system: Any = None
    size: int | None = None

    @property
    def kind(self) -> str:
        """The suffixes that say how it is read, e.g. .jsonl.gz."""
        return next(suffix for suffix in reversed(SUFFIXES) if self.name.endswith(suffix))

    def open(self) -> IO[bytes]:
        """Its bytes as they lie there."""
        return Path(self.path).open("rb") if self.file_system is None else self.file_system.open(self.path, "rb")

    def open_unpacked(self) -> IO[bytes]:
        """Its bytes, decompressed as they are read."""
        if self.name.endswith(".gz"):
            return cast(IO[bytes], _Gzip(self.open()))
        if self.name.endswith(".zst"):
            stream: Any = pa.CompressedInputStream(pa.PythonFile(self.open(), "r"), "zstd")
            return io.BufferedReader(stream, 1 << 20)
        return self.open()

    def broken(self, error: Exception, where: str = "") -> DataError:
        """That it cannot be read."""
        return DataError(f"{self.name}: cannot be read{where}: {_reason(error)}")


class _Gzip(gzip.GzipFile):
    """Closes the file below, too."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(fileobj=file)
        self._below = file

    def close(self) -> None:
        super().close()
        self._below.close()


def find_files(path: str) -> list[DataFile]:
    """The files of a path, in the order of their names.

    A folder means all data files in it, at any depth; what starts with . or _ is left out. A glob means what it
    matches: files, and folders. A file that has exactly this name is taken first.

    Raises:
        DataError: there are none, one is empty or of an unknown kind, or the place cannot be looked at.
    """
    try:
        files = _find(path, *_file_system(path))
    except DataError as error:
        raise DataError(f"{without_keys(path)}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"{without_keys(path)}: no such file") from None
    except Exception as error:  # every file system raises kinds of its own, packages that it needs may not be there
        raise DataError(f"{without_keys(path)}: cannot be looked at: {_reason(error)}") from None
    alone = len(files) == 1
    for file in files:
        # A part that nothing went into is a plain file without a line; in a compressed one a header would be left.
        if file.size == 0 and (alone or file.kind not in KINDS[:3]):
            where = "" if alone else f" {file.name}:"
            raise DataError(f"{without_keys(path)}:{where} the file is empty")
    return files


def local_path(path: str) -> Path | None:
    """A path of this machine, as such; None for any other place."""
    if "://" in path and not path.startswith(("file://", "local://")):
        return None
    return Path(_file_system(path)[1])


def _file_system(path: str) -> tuple[Any, str]:
    """The file system that a path is of, and what it is called there."""
    from fsspec.core import url_to_fs

    system, found = url_to_fs(path if "://" in path else str(Path(path).expanduser().absolute()))
    return system, found


def _find(path: str, system: Any, found: str) -> list[DataFile]:
    there = None if "file" in system.protocol else system

    def file(at: str, name: str, size: int | None) -> DataFile:
        if not name.endswith(SUFFIXES):
            raise DataError(f"{reprlib.repr(name)} is not a data file, expected one of {', '.join(SUFFIXES)}")
        return DataFile(at, name, there, size)

    web = "http" in system.protocol  # where ? begins a query
    if web or not _GLOB.search(found) or system.exists(found):
        info = system.info(found)
        if info["type"] != "directory":
            return [file(found, (found.split("?")[0] if web else found).rpartition("/")[2], info.get("size"))]
        root, infos, known = found, system.find(found, detail=True), set(KINDS)
    else:
        root, infos, known = _root(found), {}, set()
        for at, info in system.glob(found, detail=True).items():
            infos |= system.find(at, detail=True) if info["type"] == "directory" else {at: info}
    files = []
    for at, info in sorted(infos.items()):
        name = at[len(root) :].lstrip("/")
        # Anything may lie in a folder beside its data; but .jsonl.bz2 would be data that are lost.
        beside = known and not known & set(PurePosixPath(name).suffixes)
        if not beside and not any(part.startswith((".", "_")) for part in name.split("/")):
            files.append(file(at, name, info.get("size")))
    if not files:
        raise DataError(f"no data files there, expected some of {', '.join(SUFFIXES)}")
    return files


def _root(path: str) -> str:
    """The folder before the first part with a wildcard."""
    parts = path.split("/")
    return "/".join(parts[: next(number for number, part in enumerate(parts) if _GLOB.search(part))])


def _reason(error: Exception) -> str:
    return without_keys((str(error).strip() or repr(error)).splitlines()[0])
