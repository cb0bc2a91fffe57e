"""Sources of instruction records: files and hub data sets, read in bounded memory.

Reading is cheap and lazy (`read_chunks`), so that
parsing and checking (`parse_chunk`) can run in worker processes.
"""

import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_itk.data.locations import DataFile, find_files, is_location, without_keys
from lightning_itk.data.readers import read_file
from lightning_itk.data.records import ROLES, DataError, Invalid, Record, check, parse_line
from lightning_itk.data.tools import Tools

_CHUNK_RECORDS, _CHUNK_BYTES = 512, 1 << 20


@dataclass
class Source:
    """Where records come from.

    Args:
        path: a .json, .jsonl, .ndjson (also .gz, .zst) or .parquet file, a folder of them or a glob, here or at a URL
            that fsspec knows (s3://, gs://, hf://, …), or the name of a hub data set. Files are read in the order of
            their names.
        teacher: teacher tag of all its records; None = each record's `teacher` or `is_domain` field.
        weight: how often each record is seen per epoch; 2.0 = twice, 0.5 = a fresh half of them every epoch.
        columns: our name for a field -> its name in the file, e.g. {response: answer}.
        split: split of a hub data set.
    """

    path: str
    teacher: str | None = None
    weight: float = 1.0
    columns: dict[str, str] | None = None
    split: str = "train"

    def check(self) -> None:
        """Raises DataError for a path, a tag, a weight or a column map that makes no sense."""
        if not isinstance(self.path, str):
            raise DataError(f"a source's path is {reprlib.repr(self.path)}, expected text")
        shown = without_keys(self.path)
        for name, value in (("teacher", self.teacher), ("split", self.split)):
            if not isinstance(value, str) and not (name == "teacher" and value is None):
                raise DataError(f"{shown}: {name} is {reprlib.repr(value)}, expected text")
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float):
            raise DataError(f"{shown}: weight is {reprlib.repr(self.weight)}, expected a number above 0")
        if not self.weight > 0 or self.weight == float("inf"):
            raise DataError(f"{shown}: weight is {self.weight}, expected a number above 0")
        meaning = "(our name -> your column, e.g. {response: answer})"
        if not isinstance(self.columns, dict | None):
            raise DataError(f"{shown}: columns is {reprlib.repr(self.columns)}, expected a map {meaning}")
        for role, column in (self.columns or {}).items():
            if role not in ROLES:
                known = ", ".join(ROLES)
                given = reprlib.repr(role)
                raise DataError(f"{shown}: unknown key {given} in columns, expected one of {known} {meaning}")
            if not isinstance(column, str):
                raise DataError(f"{shown}: columns maps {role} to {reprlib.repr(column)}, expected text {meaning}")

    @property
    def is_file(self) -> bool:
        return is_location(self.path)

    @property
    def name(self) -> str:
        """What a table calls it: the last part of its path, or the name of the data set. No keys of a URL."""
        return Path(without_keys(self.path)).name if self.is_file else self.path

    def files(self) -> list[DataFile]:
        """Its files, in order; their records are numbered one file after the other. Raises DataError."""
        return find_files(self.path)


if TYPE_CHECKING:
    Sources = str | Source | dict[str, Any] | list[str | Source | dict[str, Any]]
else:
    # A command-line parser that sees lists and dataclasses here would open a .json file itself, as a part of the
    # configuration; and what is no Source gets our one-line error instead of the parser's.
    Sources = Any


def as_sources(given: Any) -> list[Source]:
    """Sources from a path, a Source, a dict of its fields, or a list of these; none from None."""
    if given is None:
        return []
    items = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    sources = []
    for item in items:
        if isinstance(item, str | Path):
            item = Source(str(item))
        elif isinstance(item, dict):
            try:
                item = Source(**item)
            except TypeError as error:
                reason = str(error).removeprefix("Source.__init__() ")
                raise DataError(f"a source is {{path, teacher, weight, columns, split}}: {reason}") from None
        elif not isinstance(item, Source):
            raise DataError(f"a source is {type(item).__name__}, expected a path or {{path, teacher, weight, …}}")
        item.check()
        sources.append(item)
    return sources


class Chunk(NamedTuple):
    """Some records as they were read: lines of JSON text or objects."""

    name: str
    unit: str  # what `places` count: "line", "record" or "row"
    first: int  # index of the first record in the source
    places: list[int]  # 1-based line or record numbers in the file
    raw: list[Any]  # bytes (a line of JSON) or what a parser returned
    at: tuple[int, int] = (0, 0)  # number of its part of the source, and its own number in that

    def original(self, record: Record) -> Any:
        """A checked record of this chunk as it came, parsed, with all its columns."""
        raw = self.raw[record.number - self.first]
        return parse_line(raw) if isinstance(raw, bytes) else raw


class Part(NamedTuple):
    """What of a source is read in one go: a file, or a data set of the hub."""

    source: Source
    number: int
    file: DataFile | None

    def chunks(self, first: int = 0) -> Iterator[Chunk]:
        """Its records piece by piece; `first` is the number of its first one. No chunk is of two parts."""
        records, unit = read_file(self.file) if self.file else (enumerate(load_hub(self.source), 1), "record")
        name = self.file.name if self.file else self.source.path
        places: list[int] = []
        raw: list[Any] = []
        size = number = 0
        for place, record in records:
            places.append(place)
            raw.append(record)
            size += len(record) if isinstance(record, bytes) else 1000
            if len(raw) >= _CHUNK_RECORDS or size >= _CHUNK_BYTES:
                yield Chunk(name, unit, first, places, raw, (self.number, number))
                first, size, places, raw, number = first + len(raw), 0, [], [], number + 1
        if raw:
            yield Chunk(name, unit, first, places, raw, (self.number, number))


def parts(source: Source) -> list[Part]:
    """The parts of a source, in order. Raises DataError as `read_chunks`."""
    source.check()
    files: list[DataFile | None] = [*source.files()] if source.is_file else [None]
    return [Part(source, number, file) for number, file in enumerate(files)]


def read_chunks(source: Source) -> Iterator[Chunk]:
    """Read a source piece by piece, in bounded memory.

    Raises:
        DataError: missing or empty file, broken compression, JSON or Parquet, unknown data set.
    """
    first = 0
    for part in parts(source):
        for chunk in part.chunks(first):
            yield chunk
            first += len(chunk.raw)
    if first == 0:
        raise no_records(source)


def no_records(source: Source) -> DataError:
    """That a source is empty."""
    return DataError(f"{source.name}: the file holds no records")


def parse_chunk(
    chunk: Chunk,
    source: Source,
    *,
    need_response: bool = True,
    invalid: Invalid = "refuse",
    tools: Tools = "refuse",
) -> list[Record]:
    """Parse and check the records of a chunk.

    Args:
        chunk: from `read_chunks`.
        source: its source.
        need_response: False reads prompts: a response may be missing, and one that is there is left out.
        invalid: drop = a record that is not as expected stays in its place, without messages and with the reason.
        tools: learn = take records with calls of tools.

    Raises:
        DataError: at the first record that is not as expected.
    """
    records = []
    for offset, (number, raw) in enumerate(zip(chunk.places, chunk.raw, strict=True)):
        place = f"{chunk.name} {chunk.unit} {number}"
        try:
            record = parse_line(raw) if isinstance(raw, bytes) else raw
            messages, teacher = check(record, source.columns or {}, need_response=need_response, tools=tools)
            reason = ""
        except DataError as error:
            if invalid == "refuse":
                raise DataError(f"{place}: {error}") from None
            messages, teacher, reason = [], "", str(error)
        records.append(Record(messages, teacher, chunk.first + offset, place, reason))
    return records


def read(source: Source, *, need_response: bool = True, tools: Tools = "refuse") -> Iterator[Record]:
    """All records of a source, parsed and checked."""
    for chunk in read_chunks(source):
        yield from parse_chunk(chunk, source, need_response=need_response, tools=tools)


def load_hub(source: Source) -> Any:
    """The data set of a source that is no file. Raises DataError."""
    import datasets

    try:
        return datasets.load_dataset(source.path, split=source.split)
    except Exception as error:  # the hub client raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{source.path}: neither a file nor a hub data set that can be loaded: {reason}") from error
