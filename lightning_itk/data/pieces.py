"""Pieces of a token cache that several processes make, on one machine or many: one per shard.

They meet in files alone. A piece appears by a rename when it is complete, and holds nothing that depends on the others:
records are numbered within their file. So no shard waits for another, and a repeated one writes the same again.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa

from lightning_itk.data.blocks import Block, arrow_array
from lightning_itk.data.errors import DataError
from lightning_itk.data.samples import SCHEMA
from lightning_itk.data.sources import Chunk, Source, parts

_SCHEMA = SCHEMA.remove(SCHEMA.get_field_index("teacher"))  # tags get their numbers when all are known


@dataclass(frozen=True)
class Shard:
    """One of several processes that make a cache together."""

    number: int  # from 0
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From i/n. Raises DataError."""
        if (found := re.fullmatch(r"(\d+)/(\d+)", text.strip())) and int(found[1]) < int(found[2]):
            return cls(int(found[1]), int(found[2]))
        raise DataError(f"shard is {text!r}, expected i/n with i from 0 to n-1, e.g. 0/16 to 15/16")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def chunks(self, source: Source) -> Iterator[Chunk]:
        """Its chunks; their records are numbered within each part of the source."""
        found = parts(source)
        whole = len(found) >= self.count
        for part in found:
            if whole and part.number % self.count != self.number:
                continue
            for chunk in part.chunks():
                if whole or sum(chunk.at) % self.count == self.number:
                    yield chunk

    def piece(self, folder: Path) -> Path:
        """Its file."""
        return folder / f"{self.number}-of-{self.count}.arrow"

    def missing(self, folder: Path) -> list[int]:
        """Which of all shards have no piece yet."""
        return [number for number in range(self.count) if not Shard(number, self.count).piece(folder).exists()]


def write_piece(folder: Path, shard: Shard, blocks: Iterable[Block]) -> None:
    """Write a shard's piece, complete or not at all. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{uuid4().hex}.tmp"  # process numbers mean nothing among machines
    try:
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
            for block in blocks:
                columns = [arrow_array(block.columns[name]) for name in _SCHEMA.names]
                about = block._replace(columns={}, digests=b"")._asdict() | {"digests": block.digests.hex()}
                batch = pa.record_batch(columns, schema=_SCHEMA)
                writer.write_batch(batch, custom_metadata={"block": json.dumps(about)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(shard.piece(folder))
    finally:
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)


class Pieces:
    """All pieces of a cache.

    Args:
        folder: where they are.
        count: of the shards that made them.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.paths = [Shard(number, count).piece(folder) for number in range(count)]

    @classmethod
    def complete(cls, folder: Path) -> "Pieces | None":
        """Those in a folder, if none is missing."""
        counts = {int(found[1]) for path in folder.glob("*.arrow") if (found := re.search(r"-of-(\d+)$", path.stem))}
        return next((cls(folder, count) for count in sorted(counts) if not Shard(0, count).missing(folder)), None)

    def blocks(self) -> Iterator[Block]:
        """Their blocks, as one process would make them: in order, with records numbered over the whole source.

        Raises:
            DataError: a piece is broken.
            OSError: a piece is not there any more.
        """
        readers = [_open(path) for path in self.paths]
        places = sorted(
            (_at(reader, batch, path), number, batch)
            for number, (reader, path) in enumerate(zip(readers, self.paths, strict=True))
            for batch in range(reader.num_record_batches)
        )
        first = records = 0
        expected = (-1, 0)
        for at, number, batch in places:
            if at[0] != expected[0]:
                expected, first = (at[0], 0), first + records
                records = 0
            if at != expected:
                raise DataError(f"{self.paths[number].parent}: a part of the pieces is missing: delete this folder")
            block = _block(readers[number].get_batch_with_custom_metadata(batch), first)
            expected, records = (at[0], at[1] + 1), records + block.counts["records"]
            yield block


def _open(path: Path) -> pa.RecordBatchFileReader:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except pa.ArrowException as error:
        raise DataError(f"{path}: broken piece ({str(error).splitlines()[0]}): delete it") from None


def _at(reader: pa.RecordBatchFileReader, batch: int, path: Path) -> tuple[int, int]:
    try:
        part, chunk = json.loads(reader.get_batch_with_custom_metadata(batch).custom_metadata[b"block"])["at"]
        return part, chunk
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: broken piece ({error}): delete it") from None


def _block(read: Any, first: int) -> Block:
    """A block whose part of the source begins with record number `first`."""
    batch, about = read.batch, json.loads(read.custom_metadata[b"block"])
    columns: dict[str, Any] = {}
    for name in _SCHEMA.names:
        column = batch.column(name)
        listed = pa.types.is_list(column.type)
        columns[name] = (column.offsets.to_numpy(), column.values.to_numpy()) if listed else column.to_numpy()
    columns["record"] = columns["record"] + first
    counts, dropped = Counter(about.pop("counts")), Counter(about.pop("dropped"))
    digests = bytes.fromhex(about.pop("digests"))
    return Block(**about | {"columns": columns, "digests": digests, "counts": counts, "dropped": dropped})
