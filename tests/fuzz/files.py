"""Damaged files: what is read is what an independent reader reads, or the refusal is one line that names the file."""

import gzip
import io
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fuzz.engine import one_line
from fuzz.values import WORDS, damaged, mutated
from hypothesis import strategies as st
from tiny import byte_tokenizer

from lightning_itk.data.cache import tokenize
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.records import DataError, check
from lightning_itk.data.samples import TokenizedSource
from lightning_itk.data.sources import Source
from lightning_itk.data.subset import clusters_of
from lightning_itk.models.checkpoint import read_checkpoint
from lightning_itk.selection.scores import append_epoch, read_scores, write_scores

KINDS = [".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".parquet"]


@cache
def encoder() -> ChatEncoder:
    """Of bytes."""
    return ChatEncoder(byte_tokenizer())


def case(data: st.DataObject) -> str:
    """A file of one kind in a folder of its own."""
    subject = data.draw(st.sampled_from([records, records, caches, scores, clusters, checkpoints]), label="subject")
    folder = Path(tempfile.mkdtemp(prefix="itk-fuzz-"))
    try:
        return f"{subject.__name__} {subject(data, folder)}"
    finally:
        shutil.rmtree(folder)


def content(source: TokenizedSource) -> list[Any]:
    """All that a cache says of its samples."""
    samples = [source[i] for i in range(len(source))]
    teachers = [source.summary.teachers[i] for i in source.teacher]
    said = zip(samples, source.record.tolist(), teachers, source.lengths.tolist(), source.learned.tolist(), strict=True)
    return [(s.input_ids.tolist(), s.spans.tolist(), *rest) for s, *rest in said]


def expected(found: list[Any]) -> list[Any]:
    """The same from records, checked and encoded one by one."""
    made = []
    for number, record in enumerate(found):
        messages, teacher = check(record, {})
        (encoded,) = encoder().encode([messages])
        spans = encoded.spans.tolist()
        learned = sum(end - start for start, end in spans)
        made.append((encoded.input_ids.tolist(), spans, number, teacher, len(encoded.input_ids), learned))
    return made


def some_records(draw: Any) -> list[Any]:
    """A few good ones."""
    pairs = draw(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), label="records")
    return [{"prompt": q, "completion": a, "teacher": "law" if i else ""} for i, (q, a) in enumerate(pairs)]


def written(draw: Any, items: list[Any], kind: str) -> bytes:
    """A file of these records."""
    if kind == ".parquet":
        buffer = io.BytesIO()
        pq.write_table(
            pa.Table.from_pylist(items), buffer, compression=draw(st.sampled_from(["none", "snappy", "zstd"]))
        )
        return buffer.getvalue()
    ascii_only = draw(st.booleans(), label="ascii")
    if kind in (".json", ".json.gz"):
        text = json.dumps(items, ensure_ascii=ascii_only, indent=draw(st.sampled_from([None, 1]), label="indent"))
    else:
        text = "\n".join(json.dumps(item, ensure_ascii=ascii_only) for item in items) + "\n"
    return text.encode()


def independent(raw: bytes, kind: str) -> list[Any]:
    """The records of a file by other means; raises where there is no reading it."""
    if kind == ".parquet":
        return pq.read_table(io.BytesIO(raw)).to_pylist()
    text = (gzip.decompress(raw) if kind.endswith(".gz") else raw).decode("utf-8-sig")
    if kind in (".json", ".json.gz") and text.lstrip().startswith("["):
        return json.loads(text)
    lines = [line.strip(" \t\r\n\v\f") for line in text.split("\n")]
    return [json.loads(line) for line in lines if line]


def records(data: st.DataObject, folder: Path) -> str:
    """Tokenized into a cache and read back."""
    draw, kind = data.draw, data.draw(st.sampled_from(KINDS), label="kind")
    raw = written(draw, some_records(draw), kind)
    inside = kind.endswith(".gz") and draw(st.booleans(), label="before compression")
    for _ in range(draw(st.integers(0, 2), label="times")):
        raw = damaged(draw, raw)
        if not inside and kind.endswith(".gz"):
            raw, inside = gzip.compress(raw), True
    raw = gzip.compress(raw) if kind.endswith(".gz") and raw[:2] != b"\x1f\x8b" and inside else raw
    path = folder / f"data{kind}"
    path.write_bytes(raw)
    try:
        wanted: Any = expected(independent(raw, kind))
        assert wanted
    except Exception as error:  # of any kind: other readers have words of their own
        wanted = error
    try:
        found = tokenize(Source(str(path)), encoder(), 10_000, cache_dir=folder / "cache", num_proc=1, progress=False)
    except DataError as error:
        one_line(error, f"data{kind}")
        return _refused(wanted, folder / "cache")
    assert not isinstance(wanted, Exception), f"read, where another reader says {wanted!r}"
    assert content(found) == wanted, "other samples than an independent reader gives"
    return "read"


def _refused(wanted: Any, cache: Path) -> str:
    assert isinstance(wanted, Exception), f"refused, where another reader finds {wanted}"
    assert not list(cache.glob("*")), "something is left in the cache"
    return "refused"


def caches(data: st.DataObject, folder: Path) -> str:
    """A cache that is damaged after it was made."""
    draw, items = data.draw, some_records(data.draw)
    path = folder / "data.jsonl"
    path.write_bytes(written(draw, items, ".jsonl"))
    made = tokenize(Source(str(path)), encoder(), 10_000, cache_dir=folder / "cache", num_proc=1, progress=False)
    wanted = content(made)
    del made
    which = draw(st.sampled_from(["samples.arrow", "summary.json", "columns/ends.npy"]), label="file")
    file = folder / "cache" / next((folder / "cache").iterdir()).name / which
    before = file.read_bytes()
    how = draw(
        st.sampled_from(["remove", "damage", "mutate"] if which.endswith("json") else ["remove", "damage"]), label="how"
    )
    if how == "remove":
        file.unlink()
    elif how == "mutate":
        file.write_text(json.dumps(mutated(draw, json.loads(before))))
    else:
        file.write_bytes(damaged(draw, before))
    try:
        found = tokenize(Source(str(path)), encoder(), 10_000, cache_dir=folder / "cache", num_proc=1, progress=False)
        again = content(found)
    except DataError as error:
        one_line(error, str(folder))
        return "refused"
    # flipped bits of token ids show only in a checksum of all of them, which nobody waits for
    assert len(again) == len(wanted)
    assert how == "damage" or again == wanted, "other samples than were written"
    return "read"


def scores(data: st.DataObject, folder: Path) -> str:
    """A scores file, and its metadata."""
    draw, path = data.draw, folder / "scores.parquet"
    count, epochs = draw(st.integers(1, 40), label="records"), draw(st.integers(1, 3), label="epochs")
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    losses = rng.random((epochs + 1, count)).astype(draw(st.sampled_from([np.float32, np.float64])))
    write_scores(path, np.arange(count), np.arange(count) + 1, losses, {"fingerprint": "abc"})
    if draw(st.booleans(), label="metadata only"):
        table = pq.read_table(path)
        meta = mutated(draw, json.loads(table.schema.metadata[b"itk"]))
        names = draw(st.permutations(table.column_names), label="columns")
        table = table.select(names[draw(st.integers(0, 2), label="left out") :])
        pq.write_table(table.replace_schema_metadata({"itk": json.dumps(meta)}), path)
    else:
        path.write_bytes(damaged(draw, path.read_bytes()))
    try:
        found = read_scores(path)
        if draw(st.booleans(), label="append"):
            append_epoch(path, np.zeros(len(found.record), np.float32))
            found = read_scores(path, epochs=found.epochs)
    except ValueError as error:
        one_line(error, str(path))
        return "refused"
    assert found.record.tolist() == list(range(count))
    assert found.tokens.tolist() == list(range(1, count + 1))
    assert found.losses.tolist() == losses[: found.epochs + 1].tolist(), "other losses than were written"
    return "read"


def clusters(data: st.DataObject, folder: Path) -> str:
    """A file of clusters."""
    draw, path = data.draw, folder / "clusters.parquet"
    label = draw(
        st.sampled_from([[3, 1, 2], ["a", "b", "a"], [0.5, 1.0, 2.0], [None, 1, 2], [[1], [2], [3]]]), label="labels"
    )
    names = draw(
        st.sampled_from([("record", "cluster"), ("records", "cluster"), ("record", "record")]), label="columns"
    )
    numbers = draw(
        st.sampled_from([[0, 2, 1], [0.0, 1.0, 2.0], ["0", "1", "2"], [0, None, 1], [0, 0, 1]]), label="records"
    )
    table = pa.Table.from_arrays([pa.array(numbers), pa.array(label)], names=list(names))
    meta = draw(
        st.sampled_from([None, '{"fingerprint": "abc"}', '{"fingerprint": 3}', "[]", "{", "null"]), label="metadata"
    )
    pq.write_table(table.replace_schema_metadata({"itk": meta} if meta else None), path)
    if draw(st.booleans(), label="damage"):
        path.write_bytes(damaged(draw, path.read_bytes()))
    try:
        found = clusters_of(str(path), np.arange(4), "abc")
    except ValueError as error:
        one_line(error, str(path))
        return "refused"
    assert len(found) == 4
    return "read"


@cache
def checkpoint() -> bytes:
    """What a training run writes, in small."""
    buffer = io.BytesIO()
    state = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(3)}
    torch.save({"state_dict": state, "hyper_parameters": {"student": "x"}, "global_step": 7, "loops": {}}, buffer)
    return buffer.getvalue()


def checkpoints(data: st.DataObject, folder: Path) -> str:
    """A checkpoint: cut, flipped, or of other content."""
    draw, path = data.draw, folder / "last.ckpt"
    if draw(st.booleans(), label="other content"):
        values = st.sampled_from([None, 1, "x", [1], {}, torch.ones(2), {1: 2}, float("nan"), float("inf"), 10**400])
        whole = {"state_dict": {}, "hyper_parameters": {}, "global_step": 1}
        torch.save(mutated(draw, whole, values), path)
    else:
        path.write_bytes(damaged(draw, checkpoint()))
    try:
        found = read_checkpoint(path)
    except ValueError as error:
        one_line(error, str(path))
        return "refused"
    assert isinstance(found["state_dict"], dict)
    assert isinstance(found["hyper_parameters"], dict)
    int(found["global_step"])
    return "read"
