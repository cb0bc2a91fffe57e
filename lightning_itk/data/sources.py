"""Sources of instruction records: files and hub data sets, read in bounded memory.

Reading is cheap and lazy (`read_chunks`), so that
parsing and checking (`parse_chunk`) can run in worker processes.
"""

import gzip
import io
import json
import re
import reprlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from lightning_itk.data.records import ROLES, DataError, Invalid, Record, beyond_json, check, parse_line
from lightning_itk.data.tools import Tools

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".json.gz", ".jsonl.gz", ".ndjson.gz")
_CHUNK_RECORDS, _CHUNK_BYTES = 512, 1 << 20
_BROKEN_BYTE = re.compile("[\udc80-\udcff]")


@dataclass
class Source:
    """Where records come from.

    Args:
        path: a .json, .jsonl, .ndjson (also .gz) or .parquet file, or the name of a hub data set.
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
        for name, value in (("teacher", self.teacher), ("split", self.split)):
            if not isinstance(value, str) and not (name == "teacher" and value is None):
                raise DataError(f"{self.path}: {name} is {reprlib.repr(value)}, expected text")
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float):
            raise DataError(f"{self.path}: weight is {reprlib.repr(self.weight)}, expected a number above 0")
        if not self.weight > 0 or self.weight == float("inf"):
            raise DataError(f"{self.path}: weight is {self.weight}, expected a number above 0")
        meaning = "(our name -> your column, e.g. {response: answer})"
        if not isinstance(self.columns, dict | None):
            raise DataError(f"{self.path}: columns is {reprlib.repr(self.columns)}, expected a map {meaning}")
        for role, column in (self.columns or {}).items():
            if role not in ROLES:
                known = ", ".join(ROLES)
                shown = reprlib.repr(role)
                raise DataError(f"{self.path}: unknown key {shown} in columns, expected one of {known} {meaning}")
            if not isinstance(column, str):
                raise DataError(f"{self.path}: columns maps {role} to {reprlib.repr(column)}, expected text {meaning}")

    @property
    def is_file(self) -> bool:
        return self.path.endswith(_SUFFIXES) or Path(self.path).exists() or self.path.startswith((".", "/", "~"))

    def checked_path(self) -> Path:
        """The file. Raises DataError if it is missing, empty or of an unknown kind."""
        path = Path(self.path).expanduser()
        if not path.exists():
            raise DataError(f"{self.path}: no such file")
        if not path.is_file() or not path.name.endswith(_SUFFIXES):
            raise DataError(f"{self.path}: not a data file, expected one of {', '.join(_SUFFIXES)}")
        if path.stat().st_size == 0:
            raise DataError(f"{self.path}: the file is empty")
        return path


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
    unit: str  # what `places` count: "line" or "record"
    first: int  # index of the first record in the source
    places: list[int]  # 1-based line or record numbers
    raw: list[Any]  # bytes (a line of JSON) or what a parser returned

    def original(self, record: Record) -> Any:
        """A checked record of this chunk as it came, parsed, with all its columns."""
        raw = self.raw[record.number - self.first]
        return parse_line(raw) if isinstance(raw, bytes) else raw


def read_chunks(source: Source) -> Iterator[Chunk]:
    """Read a source piece by piece, in bounded memory.

    Raises:
        DataError: missing or empty file, broken compression, JSON or Parquet, unknown data set.
    """
    source.check()
    name = Path(source.path).name if source.is_file else source.path
    records, unit = _open(source)
    places: list[int] = []
    raw: list[Any] = []
    first = size = 0
    for place, record in records:
        places.append(place)
        raw.append(record)
        size += len(record) if isinstance(record, bytes) else 1000
        if len(raw) >= _CHUNK_RECORDS or size >= _CHUNK_BYTES:
            yield Chunk(name, unit, first, places, raw)
            first, size, places, raw = first + len(raw), 0, [], []
    if raw:
        yield Chunk(name, unit, first, places, raw)
    if first + len(raw) == 0:
        raise DataError(f"{name}: the file holds no records")


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


# Reading


def _open(source: Source) -> tuple[Iterator[tuple[int, Any]], str]:
    if not source.is_file:
        return _read_hub(source), "record"
    path = source.checked_path()
    if path.suffix == ".parquet":
        return _read_parquet(path), "row"
    if path.name.endswith((".json", ".json.gz")) and _first_character(path) == b"[":
        return _read_array(path), "record"
    return _read_lines(path), "line"


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _broken(path: Path, error: Exception) -> DataError:
    return DataError(f"{path.name}: cannot be read: {(str(error).strip() or repr(error)).splitlines()[0]}")


def _first_character(path: Path) -> bytes:
    try:
        with _open_bytes(path) as file:
            while block := file.read(1 << 12):
                if text := block.removeprefix(b"\xef\xbb\xbf").lstrip():
                    return text[:1]
    except (OSError, EOFError, zlib.error) as error:
        raise _broken(path, error) from None
    return b""


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with _open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line := line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise _broken(path, error) from None


def _read_array(path: Path) -> Iterator[tuple[int, Any]]:
    """The objects of a JSON list, without ever holding the whole file."""
    decoder = json.JSONDecoder()
    block, position, line, count = 1 << 20, 0, 1, 0
    state = "start"  # then "value" or "comma" expected, or "end"
    try:
        # Bytes that are no UTF-8 come as lone surrogates, so that the record that holds one can be named.
        with _open_bytes(path) as binary, io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape") as file:
            text, at_end, broken_bytes = "", False, False
            while True:
                while position < len(text) and text[position] in " \t\r\n":
                    position += 1
                character = text[position : position + 1]
                if state == "end" and character:
                    raise DataError(f"{path.name} line {line + text.count(chr(10), 0, position)}: text after the list")
                broken = None
                if character and state != "value":
                    position += 1
                    if state == "start":
                        state = "value"
                    elif character in ",]":
                        state = "value" if character == "," else "end"
                    else:
                        raise DataError(f"{path.name} record {count}: broken JSON: expected , or ] after it")
                    continue
                if character == "]" and count == 0:
                    position, state = position + 1, "end"
                    continue
                if character:
                    try:
                        value, after = decoder.raw_decode(text, position)
                    except json.JSONDecodeError as error:
                        broken = error
                    except (RecursionError, ValueError) as error:
                        raise DataError(f"{path.name} record {count + 1}: {beyond_json(error)}") from None
                    else:
                        if after < len(text) or at_end:  # a number at the edge may go on
                            if broken_bytes:
                                _check_utf8(text[position:after], f"{path.name} record {count + 1}")
                            count, position, state = count + 1, after, "comma"
                            yield count, value
                            continue
                if at_end:
                    if state == "end":
                        return
                    where = position if broken is None else broken.pos
                    reason = "the list does not end" if broken is None else broken.msg
                    if broken_bytes:  # a string that does not end is told from its beginning
                        end = len(text) if reason.startswith("Unterminated") else where + 1
                        _check_utf8(text[position:end], f"{path.name} record {count + 1}")
                    raise DataError(f"{path.name} line {line + text.count(chr(10), 0, where)}: broken JSON: {reason}")
                line += text.count("\n", 0, position)
                text, position = text[position:], 0
                # Twice the rest, so that a long object is not parsed again and again from its start.
                more = file.read(max(block, len(text)))
                text, at_end = text + more, not more
                broken_bytes = broken_bytes or _BROKEN_BYTE.search(more) is not None
    except (OSError, EOFError, zlib.error) as error:
        raise _broken(path, error) from None


def _check_utf8(text: str, place: str) -> None:
    if byte := _BROKEN_BYTE.search(text):
        raise DataError(f"{place}: not UTF-8 text: byte 0x{ord(byte[0]) - 0xDC00:02x}")


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with pa.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_CHUNK_RECORDS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # also dates that Python does not know
        raise _broken(path, error) from None


def load_hub(source: Source) -> Any:
    """The data set of a source that is no file. Raises DataError."""
    import datasets

    try:
        return datasets.load_dataset(source.path, split=source.split)
    except Exception as error:  # the hub client raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{source.path}: neither a file nor a hub data set that can be loaded: {reason}") from error


def _read_hub(source: Source) -> Iterator[tuple[int, Any]]:
    yield from enumerate(load_hub(source), 1)
