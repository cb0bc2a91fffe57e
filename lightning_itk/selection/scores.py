"""The scores file: what each record's response cost a model, before training and after each epoch.

One Parquet file with the columns `record` (int64, ascending), `tokens` (int32, response tokens) and `loss_0` … `loss_k`
(float32 or float64, mean response NLL in nats, nan where a record has no response token). The schema's metadata holds
one JSON object under the key `itk`: which records, tokenizer, chat template and model the losses belong to.

A file is written under a temporary name, synced and renamed, so a reader sees the old one or the new one. Reading and
adding an epoch go through the file in batches. Digests of the columns lie beside the metadata: Parquet's own checksums
leave the headers of pages out, and with a damaged one other losses are read.
"""

import hashlib
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from lightning_itk.files import atomic_write

FORMAT = 1
METADATA_KEY = b"itk"
_DIGESTS = b"itk_digests"  # of the columns' bytes, by name
_ROWS = 1 << 20  # rows of one row group, and of everything that is in memory twice


@dataclass(frozen=True)
class Scores:
    """The scores of `n` records; `losses[e]` belongs to the model after `e` epochs."""

    record: NDArray[np.int64]  # [n], ascending record numbers
    tokens: NDArray[np.int32]  # [n], response tokens
    losses: NDArray[Any]  # [epochs + 1, n], nan where tokens == 0
    meta: dict[str, Any]  # fingerprint, tokenizer, template, model, epochs and whatever else the writer noted
    path: str = "scores"

    @property
    def epochs(self) -> int:
        """How many epochs of training the losses cover."""
        return len(self.losses) - 1


def write_scores(
    path: str | Path, record: ArrayLike, tokens: ArrayLike, losses: ArrayLike, meta: Mapping[str, Any]
) -> None:
    """Write a scores file, replacing an older one only when the new one is complete.

    Args:
        path: where; its folder is made if needed.
        record: record numbers [n], ascending, each once.
        tokens: response tokens [n].
        losses: mean response NLL [epochs + 1, n], float32 or float64; nan where tokens == 0.
        meta: at least `fingerprint`, of the records and their order; usually also tokenizer, template and model.
            `format` and `epochs` are filled in.

    Raises:
        ValueError: arrays of unequal length, record numbers out of order, infinite losses or no fingerprint.
    """
    record, tokens, losses = np.asarray(record, np.int64), np.asarray(tokens, np.int32), np.asarray(losses)
    if losses.ndim != 2 or not record.shape == tokens.shape == losses.shape[1:]:
        shapes = f"record {record.shape}, tokens {tokens.shape}, losses {losses.shape}"
        raise ValueError(f"scores need record [n], tokens [n] and losses [epochs + 1, n], found {shapes}")
    _check_ascending(record, path)
    if "fingerprint" not in meta:
        raise ValueError("the metadata of scores must name the fingerprint of the records")
    dtype = losses.dtype if losses.dtype == np.float64 else np.dtype(np.float32)
    schema = _schema(len(losses), pa.from_numpy_dtype(dtype), meta)
    with _writer(path, schema) as writer:
        for rows in _slices(len(record)):
            columns = [record[rows], tokens[rows], *(_losses(epoch[rows], dtype, path) for epoch in losses)]
            writer.write(pa.record_batch([pa.array(column) for column in columns], schema=schema))


def append_epoch(
    path: str | Path, losses: ArrayLike, meta: Mapping[str, Any] | None = None, *, epoch: int | None = None
) -> int:
    """Add the losses after one more epoch to a scores file: the file is written anew, batch by batch, and renamed.

    Args:
        path: a scores file.
        losses: mean response NLL [n], in the file's record order.
        meta: entries to change in the metadata.
        epoch: the epoch that the losses belong to; None = the next one.

    Returns:
        The number of epochs that the file now covers.

    Raises:
        ValueError: not a scores file, another number of losses than records, or an epoch that is not the next one.
    """
    losses = np.asarray(losses)
    with _open(path) as file:
        old = _meta(file, path)
        if losses.shape != (file.metadata.num_rows,):
            raise ValueError(f"{path}: {file.metadata.num_rows} records, but losses of shape {losses.shape}")
        if epoch not in (None, old["epochs"] + 1):
            raise ValueError(f"{path}: covers {old['epochs']} epochs, so the next is not epoch {epoch}")
        column = file.schema_arrow.field("loss_0").type
        schema = _schema(old["epochs"] + 2, column, {**old, **(meta or {})})
        with _writer(path, schema) as writer:
            start = 0
            for batch in _batches(file, path, schema.names[:-1]):
                new = _losses(losses[start : start + len(batch)], np.dtype(column.to_pandas_dtype()), path)
                arrays = [*(batch.column(name) for name in schema.names[:-1]), pa.array(new)]
                writer.write(pa.record_batch(arrays, schema=schema))
                start += len(batch)
    return int(old["epochs"]) + 1


def read_scores(path: str | Path, *, epochs: int | None = None) -> Scores:
    """Read a scores file.

    Args:
        path: the file.
        epochs: read the losses up to this epoch only (LP_app needs 1); None = all there are.

    Raises:
        ValueError: not Parquet, not a scores file, missing columns, fewer epochs than asked, records out of order.
    """
    with _open(path) as file:
        meta = _meta(file, path)
        if epochs is None:
            epochs = int(meta["epochs"])
        elif epochs > meta["epochs"]:
            raise ValueError(f"{path}: holds {meta['epochs']} epochs of losses, {epochs} are needed")
        rows = file.metadata.num_rows
        names = ["record", "tokens", *(f"loss_{epoch}" for epoch in range(epochs + 1))]
        dtype = file.schema_arrow.field("loss_0").type.to_pandas_dtype()
        try:
            record, tokens = np.empty(rows, np.int64), np.empty(rows, np.int32)
            losses = np.empty((epochs + 1, rows), dtype)
        except (ValueError, MemoryError):
            raise ValueError(f"{path}: damaged (of {rows} records)") from None
        start = 0
        for batch in _batches(file, path, names):
            for name, target in zip(names, (record, tokens, *losses), strict=True):
                values = batch.column(name)
                if values.null_count and target.dtype.kind == "i":
                    raise ValueError(f"{path}: column {name} holds an empty value")
                target[start : start + len(batch)] = values.to_numpy(zero_copy_only=False)
            start += len(batch)
    pa.default_memory_pool().release_unused()  # hundreds of MiB that decoding leaves
    _check_ascending(record, path)
    return Scores(record, tokens, losses, meta, str(path))


def read_meta(path: str | Path) -> dict[str, Any]:
    """What a scores file says about itself: fingerprint, tokenizer, template, model, epochs. Reads no rows."""
    with _open(path) as file:
        return _meta(file, path)


def check_records(scores: Scores | Mapping[str, Any], fingerprint: str, records: int | None = None) -> None:
    """Refuse scores that were made on other records, or on the same ones in another order.

    Args:
        scores: the scores, or only their metadata.
        fingerprint: of the records at hand.
        records: how many there are at hand; None = the fingerprint is enough.

    Raises:
        ValueError: they do not belong together.
    """
    name, meta = (scores.path, scores.meta) if isinstance(scores, Scores) else ("scores", scores)
    if isinstance(scores, Scores) and records is not None and len(scores.record) != records:
        raise ValueError(f"{name}: holds {len(scores.record)} records, the data has {records}")
    if meta["fingerprint"] != fingerprint:
        found = f"fingerprint {meta['fingerprint']}, the data has {fingerprint}"
        raise ValueError(f"{name}: made on other records or in another order ({found})")


def _schema(losses: int, dtype: pa.DataType, meta: Mapping[str, Any]) -> pa.Schema:
    noted = {**meta, "format": FORMAT, "epochs": losses - 1}
    fields = [("record", pa.int64()), ("tokens", pa.int32()), *((f"loss_{e}", dtype) for e in range(losses))]
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(noted).encode()})


class _Digests:
    """Digests of columns that are gone through batch by batch."""

    def __init__(self, names: Iterable[str]) -> None:
        self._hashes = {name: hashlib.blake2b(digest_size=16) for name in names}

    def add(self, name: str, values: NDArray[Any]) -> None:
        self._hashes[name].update(np.ascontiguousarray(values).view(np.uint8).data)

    def hex(self) -> dict[str, str]:
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}


class _Writer:
    """Writes batches, and the digests of their columns behind them."""

    def __init__(self, file: pq.ParquetWriter) -> None:
        self._file, self._digests = file, _Digests(file.schema.names)

    def write(self, batch: pa.RecordBatch) -> None:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            self._digests.add(name, column.to_numpy(zero_copy_only=False))
        self._file.write_batch(batch)

    def finish(self) -> None:
        self._file.add_key_value_metadata({_DIGESTS: json.dumps(self._digests.hex()).encode()})


@contextmanager
def _writer(path: str | Path, schema: pa.Schema) -> Iterator[_Writer]:
    """A writer of a file that appears complete or not at all."""
    # Record numbers count up, losses never repeat: deltas for the former, byte planes for the latter.
    encoding = {
        name: "DELTA_BINARY_PACKED" if name in ("record", "tokens") else "BYTE_STREAM_SPLIT" for name in schema.names
    }
    options = {"compression": "zstd", "use_dictionary": False, "column_encoding": encoding}
    options["write_page_checksum"] = True
    with atomic_write(path) as file, pq.ParquetWriter(file, schema, **options) as parquet:
        writer = _Writer(parquet)
        yield writer
        writer.finish()


@contextmanager
def _open(path: str | Path) -> Iterator[pq.ParquetFile]:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        _ = file.schema_arrow  # parsed when it is first asked for
    except FileNotFoundError:
        raise ValueError(f"{path}: no such scores file") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
    with file:
        yield file


def _batches(file: pq.ParquetFile, path: str | Path, names: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows, some at a time; after the last of them an error if they are not those that were written."""
    batches, digests = file.iter_batches(_ROWS, columns=names), _Digests(names)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: damaged ({str(error).splitlines()[0]})") from None
        if batch is None:
            break
        for name in names:
            digests.add(name, batch.column(name).to_numpy(zero_copy_only=False))
        yield batch
    noted = (file.metadata.metadata or {}).get(_DIGESTS)  # earlier versions wrote none
    try:
        expected = digests.hex() if noted is None else json.loads(noted)
        wrong = [name for name, digest in digests.hex().items() if expected[name] != digest]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: damaged (the digests of its columns: {error!r})") from None
    if wrong:
        raise ValueError(f"{path}: damaged (column {wrong[0]} is not what was written)")


def _meta(file: pq.ParquetFile, path: str | Path) -> dict[str, Any]:
    schema = file.schema_arrow
    if METADATA_KEY not in (schema.metadata or {}):
        raise ValueError(f"{path}: not a scores file (no {METADATA_KEY.decode()!r} metadata)")
    try:
        meta = json.loads(schema.metadata[METADATA_KEY])
        known, epochs = meta["format"], meta["epochs"]
        if isinstance(epochs, bool) or not isinstance(epochs, int) or not 0 <= epochs < len(schema.names):
            raise ValueError(f"epochs is {reprlib.repr(epochs)}, and there are {len(schema.names)} columns")
        wanted = ["record", "tokens", *(f"loss_{epoch}" for epoch in range(epochs + 1))]
        _ = meta["fingerprint"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: broken {METADATA_KEY.decode()!r} metadata ({error!r})") from None
    if known != FORMAT:
        raise ValueError(f"{path}: format {reprlib.repr(known)} of the scores file is unknown, expected {FORMAT}")
    missing = [name for name in wanted if name not in schema.names]
    if missing:
        raise ValueError(f"{path}: column {missing[0]} is missing, found {', '.join(schema.names)}")
    for name in wanted:
        kind = schema.field(name).type
        expected = pa.types.is_integer if name in ("record", "tokens") else pa.types.is_floating
        if not expected(kind):
            raise ValueError(f"{path}: column {name} holds {kind}")
    return dict(meta)


def _losses(values: NDArray[Any], dtype: np.dtype[Any], path: str | Path) -> NDArray[Any]:
    if np.isinf(values).any():
        raise ValueError(f"{path}: losses must be finite or nan, found an infinite one")
    return values.astype(dtype, copy=False)


def _check_ascending(record: NDArray[np.int64], path: str | Path) -> None:
    wrong = np.flatnonzero(record[1:] <= record[:-1])
    if len(wrong):
        after, found = record[wrong[0]], record[wrong[0] + 1]
        raise ValueError(f"{path}: record numbers must ascend, found {found} after {after}")


def _slices(rows: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, rows, _ROWS))
