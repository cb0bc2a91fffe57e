"""The records of a file, one after the other, in bounded memory: lines of JSON, a JSON list, or Parquet."""

import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from lightning_itk.data.locations import DataFile
from lightning_itk.data.records import DataError, beyond_json

_ROWS = 512  # of Parquet at a time
# Parquet also holds dates that Python does not know.
_BROKEN = (OSError, EOFError, zlib.error, pa.ArrowException, ValueError, OverflowError)
_BROKEN_BYTE = re.compile("[\udc80-\udcff]")


def read_file(file: DataFile) -> tuple[Iterator[tuple[int, Any]], str]:
    """Records with their places, and what the places count: line, record or row.

    A record is bytes (a line of JSON) or what a parser returned; places count from 1.

    Raises:
        DataError: broken compression, JSON or Parquet, or a place that cannot be read; also while reading.
    """
    if file.kind == ".parquet":
        return _told(file, "row", _read_parquet(file)), "row"
    if file.kind.startswith((".jsonl", ".ndjson")) or next(_told(file, "byte", _first_character(file)))[1] != b"[":
        return _told(file, "line", _read_lines(file)), "line"
    return _told(file, "record", _read_array(file)), "record"


def _told(file: DataFile, unit: str, records: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """The same; what goes wrong between them becomes one line."""
    place = 0
    try:
        for place, record in records:
            yield place, record
    except DataError:
        raise
    except Exception as error:
        if file.file_system is None and not isinstance(error, _BROKEN):
            raise  # a bug; but other file systems raise kinds of their own
        raise file.broken(error, f" after {unit} {place}" if place else "") from None


def _first_character(file: DataFile) -> Iterator[tuple[int, bytes]]:
    with file.open_unpacked() as unpacked:
        while block := unpacked.read(1 << 12):
            if text := block.removeprefix(b"\xef\xbb\xbf").lstrip():
                yield 0, text[:1]
                return
    yield 0, b""


def _read_lines(file: DataFile) -> Iterator[tuple[int, bytes]]:
    with file.open_unpacked() as unpacked:
        for number, line in enumerate(unpacked, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line := line.strip():
                yield number, line


def _read_array(file: DataFile) -> Iterator[tuple[int, Any]]:
    """The objects of a JSON list, without ever holding the whole file."""
    decoder = json.JSONDecoder()
    block, position, line, count = 1 << 20, 0, 1, 0
    state = "start"  # then "value" or "comma" expected, or "end"
    # Bytes that are no UTF-8 come as lone surrogates, so that the record that holds one can be named.
    with file.open_unpacked() as binary, io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape") as unpacked:
        text, at_end, broken_bytes = "", False, False
        while True:
            while position < len(text) and text[position] in " \t\r\n":
                position += 1
            character = text[position : position + 1]
            if state == "end" and character:
                raise DataError(f"{file.name} line {line + text.count(chr(10), 0, position)}: text after the list")
            broken = None
            if character and state != "value":
                position += 1
                if state == "start":
                    state = "value"
                elif character in ",]":
                    state = "value" if character == "," else "end"
                else:
                    raise DataError(f"{file.name} record {count}: broken JSON: expected , or ] after it")
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
                    raise DataError(f"{file.name} record {count + 1}: {beyond_json(error)}") from None
                else:
                    if after < len(text) or at_end:  # a number at the edge may go on
                        if broken_bytes:
                            _check_utf8(text[position:after], f"{file.name} record {count + 1}")
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
                    _check_utf8(text[position:end], f"{file.name} record {count + 1}")
                raise DataError(f"{file.name} line {line + text.count(chr(10), 0, where)}: broken JSON: {reason}")
            line += text.count("\n", 0, position)
            text, position = text[position:], 0
            # Twice the rest, so that a long object is not parsed again and again from its start.
            more = unpacked.read(max(block, len(text)))
            text, at_end = text + more, not more
            broken_bytes = broken_bytes or _BROKEN_BYTE.search(more) is not None


def _check_utf8(text: str, place: str) -> None:
    if byte := _BROKEN_BYTE.search(text):
        raise DataError(f"{place}: not UTF-8 text: byte 0x{ord(byte[0]) - 0xDC00:02x}")


def _read_parquet(file: DataFile) -> Iterator[tuple[int, Any]]:
    with file.open() as binary, pa.parquet.ParquetFile(binary) as table:
        number = 0
        for batch in table.iter_batches(batch_size=_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row
