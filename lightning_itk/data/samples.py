"""The samples of one source as `cache.py` left them on disk: memory-mapped, never loaded whole."""

import hashlib
import json
import mmap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_itk.data.chat import Encoded
from lightning_itk.data.columns import every, map_columns, write_columns
from lightning_itk.data.records import DataError

CUT_OFF = "response cut off by max_length"
TOO_LONG = "prompt longer than max_length"
_RELEASE_BYTES = 1 << 28
SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "spans": pa.list_(pa.int32()),  # flat pairs: first learned token, one after the last
        "record": pa.int64(),  # number of the record in its source
        "teacher": pa.int32(),  # index into the tags of the metadata
        "response_chars": pa.int32(),
        "digest": pa.uint64(),  # of the conversation, without the tokenizer
    }
)


@dataclass
class Summary:
    """What became of the records of a source."""

    records: int = 0
    samples: int = 0
    truncated: int = 0  # samples kept with the end of their conversation cut off
    tokens: int = 0
    learned: int = 0
    unfinished: int = 0  # samples whose answer was cut off when it was generated: its end is not learned
    max_token_id: int = -1
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> records
    invalid: list[str] = field(default_factory=list)  # the first places and reasons of records that cannot be used
    teachers: list[str] = field(default_factory=list)  # tags in order of appearance
    fingerprint: str = ""  # of the records in their order, dropped ones included, without the tokenizer

    def to_json(self) -> str:
        """All of it, with a check sum."""
        return json.dumps({**vars(self), "check": _check_sum(vars(self))})

    @classmethod
    def from_json(cls, text: str) -> "Summary":
        """Raises ValueError or TypeError for anything but what `to_json` wrote."""
        fields = json.loads(text)
        if not isinstance(fields, dict) or fields.pop("check", None) != _check_sum(fields):
            raise ValueError("summary.json was changed")
        return cls(**fields)


def _check_sum(fields: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=8).hexdigest()


def report(name: str, summaries: Sequence[Summary], max_length: int) -> None:
    """One line on what became of the records. Raises DataError if no sample is left."""
    records, samples, truncated, tokens, learned, unfinished = (
        sum(getattr(summary, field) for summary in summaries)
        for field in ("records", "samples", "truncated", "tokens", "learned", "unfinished")
    )
    dropped: Counter[str] = Counter()
    for summary in summaries:
        dropped.update(summary.dropped)
    limit = dict.fromkeys((CUT_OFF, TOO_LONG), f"={max_length}")
    reasons = ", ".join(f"{count:,} {reason}{limit.get(reason, '')}" for reason, count in sorted(dropped.items()))
    if not samples:
        raise DataError(f"{name}: no sample is left of {records:,} records: {reasons}")
    rank_zero_info(
        f"{name}: {records:,} records, {samples:,} samples"
        + (f", dropped {reasons}" if reasons else "")
        + (f", {truncated:,} truncated" if truncated else "")
        + (f", {unfinished:,} with finished: false (their end is not learned)" if unfinished else "")
        + f", {tokens:,} tokens"
        + (f", {learned / tokens:.1%} learned" if learned else "")
    )
    for place in [place for summary in summaries for place in summary.invalid][:10]:
        rank_zero_info(f"  left out: {place}")
    if (share := sum(dropped.values()) / records) > 0.05:
        rank_zero_warn(f"{name}: {share:.0%} of the records were dropped: {reasons}")


# Of each sample: what a run asks of all of them before it has read any, and where the rest is in samples.arrow.
_COLUMNS = {
    "lengths": np.int32,
    "learned": np.int32,
    "record": np.int64,
    "teacher": np.int32,
    "response_chars": np.int32,
    "digest": np.uint64,
    "tokens_at": np.int64,  # byte
    "spans_at": np.int64,
    "ends": np.int32,  # of spans: two of each
}


def index_samples(folder: Path) -> None:
    """Write the columns beside a finished samples.arrow, in bounded memory. Raises OSError."""
    with (folder / "samples.arrow").open("rb") as file:
        whole = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    reader = pa.ipc.open_file(whole)
    batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    write_columns(folder / "columns", (_columns_of(batch, whole.address) for batch in batches), _COLUMNS)


def _columns_of(batch: pa.RecordBatch, start: int) -> dict[str, np.ndarray]:
    columns = {name: batch.column(name).to_numpy() for name in ("record", "teacher", "response_chars", "digest")}
    for name, at, size in (("input_ids", "tokens_at", "lengths"), ("spans", "spans_at", "ends")):
        offsets, values = batch.column(name).offsets.to_numpy(), batch.column(name).values
        begin = values.buffers()[1].address - start if len(values) else 0
        columns |= {at: begin + 4 * offsets[:-1].astype(np.int64), size: np.diff(offsets)}
    offsets, ends = batch.column("spans").offsets.to_numpy(), batch.column("spans").values.to_numpy()
    total = np.concatenate([[0], np.cumsum(ends[1::2] - ends[::2])])
    return columns | {"learned": np.diff(total[offsets // 2])}


class TokenizedSource:
    """The samples of one source, mapped from its cache folder: opening it copies nothing of them into memory.

    Attributes:
        lengths: tokens [samples].
        learned: learned tokens [samples].
        record: number of the record in the source [samples].
        teacher: index into the tags of the summary [samples].
        response_chars: characters of the response [samples].
        digest: hash of the conversation [samples].
    """

    lengths: np.ndarray
    learned: np.ndarray
    record: np.ndarray
    teacher: np.ndarray
    response_chars: np.ndarray
    digest: np.ndarray

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bytes_read = 0
        try:
            self.summary = Summary.from_json((folder / "summary.json").read_text())
            self._check_summary()
            with (folder / "samples.arrow").open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            columns = map_columns(folder / "columns", self.summary.samples, _COLUMNS)
            self._tokens_at, self._spans_at, self._ends = (columns.pop(n) for n in ("tokens_at", "spans_at", "ends"))
            vars(self).update(columns)
            self._check()
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise self._broken((str(error).strip() or repr(error)).splitlines()[0]) from error

    def _broken(self, reason: str) -> DataError:
        return DataError(f"{self.folder}: broken cache ({reason}): delete this folder")

    def _check_summary(self) -> None:
        summary, plain = self.summary, Summary()
        if any(type(value) is not type(getattr(plain, name)) for name, value in vars(summary).items()):
            raise ValueError("summary.json holds values of the wrong type")
        if not all(isinstance(tag, str) for tag in summary.teachers):
            raise ValueError("summary.json names teachers that are no text")
        if summary.samples < 0:
            raise ValueError("summary.json counts less than no samples")

    def _check(self) -> None:
        """Raises ValueError where the columns are not what the summary says. Token ids are not read for it."""
        summary, size = self.summary, len(self._map)
        for name, column in (("tokens", self.lengths), ("learned", self.learned)):
            if getattr(summary, name) != (count := int(column.sum(dtype=np.int64))):
                raise ValueError(f"{count} {name}, the summary says {getattr(summary, name)}")
        for name, column, count in (
            ("record", self.record, summary.records),
            ("teacher", self.teacher, len(summary.teachers)),
        ):
            if not every(lambda values, count=count: (values >= 0) & (values < count), column):
                raise ValueError(f"a {name} number outside 0 to {count - 1}")
        ordered = every(lambda now, after: now < after, self.record[:-1], self.record[1:])
        if not ordered or not every(lambda values: values > 0, self.lengths):
            raise ValueError("samples out of order")

        def inside(at: np.ndarray, count: np.ndarray) -> np.ndarray:
            return (at >= 0) & (at % 4 == 0) & (count >= 0) & (at + 4 * count.astype(np.int64) <= size)

        if not every(inside, self._tokens_at, self.lengths) or not every(inside, self._spans_at, self._ends):
            raise ValueError("a sample that is not in samples.arrow")

    def __reduce__(self) -> tuple[type["TokenizedSource"], tuple[Path]]:
        return TokenizedSource, (self.folder,)  # spawned loader workers map the files themselves

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Encoded:
        """Copies of the tokens and the learned spans of a sample. Raises DataError where they are not as written."""
        tokens = np.frombuffer(self._map, np.int32, self.lengths[index], self._tokens_at[index]).copy()
        spans = np.frombuffer(self._map, np.int32, self._ends[index], self._spans_at[index]).copy()
        if len(spans) % 2 or int((spans[1::2] - spans[::2]).sum()) != self.learned[index]:
            raise self._broken(f"the learned tokens of sample {index}")
        self._bytes_read += tokens.nbytes
        if self._bytes_read > _RELEASE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            # Mapped pages count as this process's memory; handing them back leaves them in the system's file cache.
            self._map.madvise(mmap.MADV_DONTNEED)
            self._bytes_read = 0
        return Encoded(tokens, spans.reshape(-1, 2))
