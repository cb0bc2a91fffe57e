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


class TokenizedSource:
    """The samples of one source, read from its cache folder without loading them into memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bytes_read = 0
        try:
            self.summary = Summary.from_json((folder / "summary.json").read_text())
            with (folder / "samples.arrow").open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            reader = pa.ipc.open_file(pa.py_buffer(self._map))
            if not reader.schema.equals(SCHEMA):
                raise ValueError("other columns than expected")
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            for batch in batches:
                batch.validate()  # or what points beyond the file is read
            self._read(batches)
            self._check()
        except (OSError, ValueError, TypeError, IndexError, pa.ArrowException) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise DataError(f"{folder}: broken cache ({reason}): delete this folder") from error

    def _read(self, batches: list[pa.RecordBatch]) -> None:
        def whole(name: str) -> np.ndarray:
            dtype = SCHEMA.field(name).type.to_pandas_dtype()
            return np.concatenate([np.empty(0, dtype), *(batch.column(name).to_numpy() for batch in batches)])

        def lists(name: str) -> list[tuple[np.ndarray, np.ndarray]]:
            columns = [batch.column(name) for batch in batches]
            return [(column.offsets.to_numpy(), column.values.to_numpy()) for column in columns]

        self._input_ids, self._spans = lists("input_ids"), lists("spans")
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        counts = [np.diff(offsets) for offsets, _ in self._input_ids]
        self.lengths = np.concatenate([np.empty(0, np.int32), *counts])  # tokens [samples]
        self.learned = np.concatenate([np.empty(0, np.int32), *(_widths(*spans) for spans in self._spans)])
        self.record, self.teacher = whole("record"), whole("teacher")
        self.response_chars, self.digest = whole("response_chars"), whole("digest")

    def _check(self) -> None:
        """Raises ValueError where the columns are not what the summary says. Token ids are not read for it."""
        summary, plain = self.summary, Summary()
        if any(type(value) is not type(getattr(plain, name)) for name, value in vars(summary).items()):
            raise ValueError("summary.json holds values of the wrong type")
        if not all(isinstance(tag, str) for tag in summary.teachers):
            raise ValueError("summary.json names teachers that are no text")
        found = {"samples": len(self), "tokens": int(self.lengths.sum()), "learned": int(self.learned.sum())}
        for name, count in found.items():
            if getattr(summary, name) != count:
                raise ValueError(f"{count} {name}, the summary says {getattr(summary, name)}")
        for name, values, count in (
            ("record", self.record, summary.records),
            ("teacher", self.teacher, len(summary.teachers)),
        ):
            if len(values) and (values.min() < 0 or values.max() >= count):
                raise ValueError(f"a {name} number outside 0 to {count - 1}")
        if (self.lengths < 1).any() or (self.learned < 0).any() or (np.diff(self.record) < 1).any():
            raise ValueError("samples out of order")

    def __reduce__(self) -> tuple[type["TokenizedSource"], tuple[Path]]:
        return TokenizedSource, (self.folder,)  # spawned loader workers map the file themselves

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Encoded:
        """Copies of the tokens and the learned spans of a sample."""
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - self._starts[batch]
        (id_offsets, ids), (span_offsets, spans) = self._input_ids[batch], self._spans[batch]
        tokens = np.array(ids[id_offsets[row] : id_offsets[row + 1]])
        learned = np.array(spans[span_offsets[row] : span_offsets[row + 1]]).reshape(-1, 2)
        self._bytes_read += tokens.nbytes
        if self._bytes_read > _RELEASE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            # Mapped pages count as this process's memory; handing them back leaves them in the system's file cache.
            self._map.madvise(mmap.MADV_DONTNEED)
            self._bytes_read = 0
        return Encoded(tokens, learned)


def _widths(offsets: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Learned tokens per sample, from flat pairs of ends."""
    total = np.concatenate([[0], np.cumsum(spans[1::2] - spans[::2])])
    return np.diff(total[offsets // 2]).astype(np.int32)
