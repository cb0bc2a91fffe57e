"""The records behind recorded scores: which they are, their clusters, and a file of the chosen ones.

Records are read twice, piece by piece, so that only what a selection needs of each is ever in memory.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_itk.data.locations import local_path
from lightning_itk.data.records import DataError, Fingerprint, Invalid, Message, Record, joint_fingerprint
from lightning_itk.data.sources import Source, parse_chunk, read_chunks
from lightning_itk.data.tools import Tools
from lightning_itk.files import atomic_write
from lightning_itk.selection.clusters import cluster_text


@dataclass
class RecordIndex:
    """What one pass over the records of some sources found."""

    count: int = 0
    fingerprint: str = ""
    source: list[int] = field(default_factory=list)  # records in each source
    kept: list[Any] = field(default_factory=list)  # what `keep` made of each record


def index_records(
    sources: Sequence[Source],
    keep: Callable[[Record, Any], Any] | None = None,
    invalid: Invalid = "refuse",
    tools: Tools = "refuse",
) -> RecordIndex:
    """Read all records, check them, and take their fingerprint: that of a data module with the same sources.

    Args:
        sources: the sources, in the data module's order.
        keep: what to remember of a record, from its checked and its original form; None = nothing.
        invalid: drop = a record that cannot be used is counted, and None is remembered of it.
        tools: learn = take records with calls of tools.

    Raises:
        DataError: as for training.
    """
    found, fingerprints = RecordIndex(), []
    for source in sources:
        fingerprint, before = Fingerprint(), found.count
        for chunk in read_chunks(source):
            records = parse_chunk(chunk, source, invalid=invalid, tools=tools)
            fingerprint.add(b"".join(record.digest() for record in records))
            found.count += len(records)
            if keep is not None:
                found.kept += (None if record.invalid else keep(record, chunk.original(record)) for record in records)
        fingerprints.append(fingerprint)
        found.source.append(found.count - before)
    found.fingerprint = joint_fingerprint(fingerprints)
    return found


def column_value(name: str) -> Callable[[Record, Any], str]:
    """A `keep` that takes a column of the original records."""

    def value(record: Record, original: Any) -> str:
        if original.get(name) is None:
            raise DataError(f"{record.place}: no column {name!r} to cluster by, found {', '.join(original)}")
        return str(original[name])

    return value


def text_to_embed(record: Record, _: Any) -> str:
    """A `keep` that takes what the paper embeds of a record."""
    return cluster_text(_said(record.messages, "user"), _said(record.messages, "assistant"))


def check_not_data(path: str | Path, sources: Iterable[Source]) -> None:
    """Refuse to write over the data themselves. Raises DataError."""
    for source in sources:
        if source.is_file and (place := local_path(source.path)) is not None:
            own, target = place.resolve(), Path(path).expanduser().resolve()
            if target == own:
                raise DataError(f"{path}: is the data itself, name another file for the output")
            if place.is_dir() and own in target.parents or fnmatch(str(target), str(place)):
                raise DataError(f"{path}: would be read as data of {source.path}, name another place for the output")


def write_records(path: str | Path, sources: Sequence[Source], chosen: ArrayLike) -> None:
    """Write records as JSON Lines, as they were read and in their order; complete or not at all.

    Args:
        path: the file to write.
        sources: where the records are.
        chosen: record numbers over all sources.

    Raises:
        ValueError: the file cannot be written.
    """
    wanted: NDArray[np.int64] = np.unique(np.asarray(chosen, np.int64))
    with atomic_write(path) as file:
        first = 0
        for source in sources:
            read = 0
            for chunk in read_chunks(source):
                start = first + chunk.first
                low, high = np.searchsorted(wanted, [start, start + len(chunk.raw)])
                for number in wanted[low:high]:
                    file.write(_line(chunk.raw[number - start]))
                read += len(chunk.raw)
            first += read


def _line(raw: Any) -> bytes:
    """A record as a line: the very bytes it was read from, where it was one."""
    return (raw if isinstance(raw, bytes) else json.dumps(raw, ensure_ascii=False, default=str).encode()) + b"\n"


def _said(messages: Sequence[Message], role: str) -> str:
    def texts() -> Iterator[str]:
        return (message["content"] for message in messages if message["role"] == role)

    return " ".join(texts())
