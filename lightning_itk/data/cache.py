"""Tokenized records on disk: made once, in parallel and in bounded memory; `samples.py` reads them.

One folder per source, named after everything its content depends on: the file's bytes, the column map, the tokenizer,
the chat template, the length limit. It appears by a rename when it is complete, so a killed run leaves nothing that
could be taken for a cache.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lightning_itk.data.chat import ChatEncoder, Encoded
from lightning_itk.data.content import content_hash
from lightning_itk.data.records import DataError, Fingerprint, Invalid, Record
from lightning_itk.data.samples import CUT_OFF, SCHEMA, TOO_LONG, Summary, TokenizedSource
from lightning_itk.data.sources import Chunk, Source, parse_chunk, read_chunks
from lightning_itk.data.tools import Tools

FORMAT_VERSION = 3

_ABANDONED = 24 * 3600  # seconds without a write
_PLACES = 10  # of records that cannot be used are named
_IN_PROCESS_CHUNKS = 4  # so few chunks are done before worker processes have started


def default_cache_dir() -> Path:
    """$ITK_CACHE, else ~/.cache/lightning_itk."""
    return Path(os.environ.get("ITK_CACHE") or Path.home() / ".cache" / "lightning_itk")


def tokenize(
    source: Source,
    encoder: ChatEncoder,
    max_length: int,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    num_proc: int | None = None,
    prompts: bool = False,
    invalid: Invalid = "refuse",
    tools: Tools = "refuse",
    progress: bool = True,
) -> TokenizedSource:
    """The tokenized samples of a source, from the cache if they are there.

    Args:
        source: the records.
        encoder: tokenizer and chat template.
        max_length: tokens per sample; longer conversations are cut on the right, and dropped if no learned token is
            left. Prompts are never cut but dropped.
        cache_dir: folder of all caches; None = `default_cache_dir()`.
        num_proc: worker processes; None = one per usable core, 1 = this process.
        prompts: tokenize for generation: without the response, ending in the generation prompt.
        invalid: drop = leave out records that cannot be used, counted by reason.
        tools: learn = take records with calls of tools, and learn the calls.
        progress: show a progress bar.

    Raises:
        DataError: broken input, or the cache cannot be written.
    """
    root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    content = content_hash(source, root / "hashes")
    parts = [FORMAT_VERSION, content, source.files()[0].kind if source.is_file else source.split]
    parts += [sorted((source.columns or {}).items()), encoder.fingerprint(), max_length, prompts]
    parts += [invalid] if invalid != "refuse" else []
    parts += ["tools", tools] if tools != "refuse" else []
    folder = root / hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    if not folder.exists():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        _build(folder, _Job(source, encoder, max_length, prompts, invalid, tools), num_proc or cores, progress)
    return TokenizedSource(folder)


class _Job(NamedTuple):
    source: Source
    encoder: ChatEncoder
    max_length: int
    prompts: bool
    invalid: Invalid
    tools: Tools


class _Block(NamedTuple):
    """The samples of one chunk, and what its records came to."""

    columns: dict[str, Any]  # name -> array, or (offsets, values) of a list
    tags: list[str]  # one per sample
    digests: bytes  # 16 per record
    counts: Counter[str]
    dropped: Counter[str]
    invalid: list[str]  # place and reason of records that cannot be used


def _work(job: _Job, chunk: Chunk) -> _Block:
    try:
        options: Any = {"need_response": not job.prompts, "invalid": job.invalid, "tools": job.tools}
        records = parse_chunk(chunk, job.source, **options)
        encoded_records, unusable = _encode(job, [record for record in records if not record.invalid])
    except DataError as error:
        raise DataError(f"{error} (data.invalid: drop leaves such records out)") from None
    unusable = [record for record in records if record.invalid] + unusable
    kept: list[tuple[Record, Encoded]] = []
    counts, dropped = Counter(records=len(records)), Counter(record.invalid for record in unusable)
    for record, encoded in encoded_records:
        cut = encoded if job.prompts else encoded.truncated(job.max_length)
        if len(cut.input_ids) > job.max_length:
            dropped[TOO_LONG] += 1
        elif not job.prompts and not len(cut.spans):
            dropped[CUT_OFF] += 1
        else:
            kept.append((record, cut))
            counts["truncated"] += len(cut.input_ids) < len(encoded.input_ids)
    ids = [encoded.input_ids for _, encoded in kept]
    spans = [encoded.spans for _, encoded in kept]
    flat_ids = np.concatenate([np.empty(0, np.int32), *ids])
    counts["unfinished"] = sum(record.messages[-1].get("learn") == "words" for record, _ in kept)
    counts["samples"], counts["tokens"] = len(kept), len(flat_ids)
    counts["learned"] = int(sum((span[:, 1] - span[:, 0]).sum() for span in spans))
    counts["max_token_id"] = int(flat_ids.max(initial=-1))
    digests = [record.digest() for record in records]
    by_number = {record.number: digest for record, digest in zip(records, digests, strict=True)}
    columns = {
        "input_ids": (np.cumsum([0, *map(len, ids)], dtype=np.int32), flat_ids),
        "spans": (np.cumsum([0, *(span.size for span in spans)], dtype=np.int32), _flat(spans)),
        "record": np.array([record.number for record, _ in kept], np.int64),
        "response_chars": np.array([_response_chars(record) for record, _ in kept], np.int32),
        "digest": np.array([int.from_bytes(by_number[record.number][:8], "little") for record, _ in kept], np.uint64),
    }
    invalid = [f"{record.place}: {record.invalid}" for record in sorted(unusable, key=lambda record: record.number)]
    return _Block(columns, [record.teacher for record, _ in kept], b"".join(digests), counts, dropped, invalid)


def _encode(job: _Job, records: list[Record]) -> tuple[list[tuple[Record, Encoded]], list[Record]]:
    """Records with their tokens, and those that the template refuses."""

    def encode(some: list[Record]) -> list[Encoded]:
        if job.prompts:
            nothing = np.empty((0, 2), np.int32)
            return [Encoded(job.encoder.prompt_ids(record.messages, job.max_length), nothing) for record in some]
        return job.encoder.encode([record.messages for record in some], job.max_length)

    try:
        return list(zip(records, encode(records), strict=True)), []
    except ValueError:
        encoded, refused = [], []
        for record in records:  # find those that fail
            try:
                encoded.append((record, encode([record])[0]))
            except ValueError as error:
                if job.invalid == "refuse":
                    raise DataError(f"{record.place}: {error}") from None
                refused.append(record._replace(invalid=str(error)))
        return encoded, refused


def _response_chars(record: Record) -> int:
    return sum(len(message["content"]) for message in record.messages if message["role"] == "assistant")


def _flat(spans: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int32), *(span.ravel() for span in spans)])


def _build(folder: Path, job: _Job, num_proc: int, progress: bool) -> None:
    partial = folder.with_name(f"{folder.name}.{_processes()}.{os.getpid()}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        partial.mkdir()
        with pa.OSFile(str(partial / "samples.arrow"), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            summary = _write(writer, job, num_proc, progress)
        (partial / "summary.json").write_text(summary.to_json())
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    except OSError as error:
        raise DataError(f"{folder.parent}: cannot write the token cache: {error.strerror or error}") from error
    except BrokenProcessPool:
        raise DataError("a tokenizing worker was killed (out of memory?): try a smaller num_proc") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(writer: pa.RecordBatchFileWriter, job: _Job, num_proc: int, progress: bool) -> Summary:
    summary, fingerprint = Summary(), Fingerprint()
    tags: dict[str, int] = {}
    columns = [SpinnerColumn(), TextColumn("tokenizing {task.description}"), MofNCompleteColumn(), TimeElapsedColumn()]
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
        task = bar.add_task(job.source.name, total=None)
        for block in _blocks(job, num_proc):
            teacher = np.array([tags.setdefault(tag, len(tags)) for tag in block.tags], np.int32)
            arrays = {**block.columns, "teacher": teacher}
            if block.counts["samples"]:
                writer.write_batch(pa.record_batch([_array(arrays[name]) for name in SCHEMA.names], schema=SCHEMA))
            for name in ("records", "samples", "truncated", "tokens", "learned", "unfinished"):
                setattr(summary, name, getattr(summary, name) + block.counts[name])
            summary.max_token_id = max(summary.max_token_id, block.counts["max_token_id"])
            for reason, count in block.dropped.items():
                summary.dropped[reason] = summary.dropped.get(reason, 0) + count
            summary.invalid += block.invalid[: _PLACES - len(summary.invalid)]
            fingerprint.add(block.digests)
            bar.update(task, completed=summary.records)
    summary.teachers, summary.fingerprint = list(tags), str(fingerprint)
    return summary


def _array(column: Any) -> pa.Array:
    if isinstance(column, tuple):
        return pa.ListArray.from_arrays(*map(pa.array, column))
    return pa.array(column)


def _blocks(job: _Job, num_proc: int) -> Iterator[_Block]:
    """Chunks through the workers, in order; only a few per worker are in memory at a time."""
    chunks = read_chunks(job.source)
    first = list(islice(chunks, _IN_PROCESS_CHUNKS + 1))
    if num_proc == 1 or len(first) <= _IN_PROCESS_CHUNKS:
        yield from (_work(job, chunk) for chunk in chain(first, chunks))
        return
    # fork shares the tokenizer and needs no `if __name__ == "__main__"` in the user's script. The workers touch
    # neither CUDA nor torch; elsewhere than on Linux fork is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with _tokenizer_threads_off():
        pool = ProcessPoolExecutor(num_proc, context, _start_worker, (job,))
        waiting: deque[Future[_Block]] = deque()
        try:
            for chunk in chain(first, chunks):
                waiting.append(pool.submit(_work_here, chunk))
                if len(waiting) > 2 * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_job: _Job


def _start_worker(job: _Job) -> None:
    global _job
    _job = job
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            wait([parent.sentinel])
            os._exit(1)  # the parent was killed: do not wait for work that never comes

    threading.Thread(target=follow, daemon=True).start()


def _work_here(chunk: Chunk) -> _Block:
    return _work(_job, chunk)


@contextlib.contextmanager
def _tokenizer_threads_off() -> Iterator[None]:
    """Worker processes are the parallelism; the threads that the tokenizers library may have had are lost in a fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _processes() -> str:
    """Names the set of processes whose numbers mean something here: those of this machine, and of this container."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.blake2b(f"{socket.gethostname()} {namespace}".encode(), digest_size=6).hexdigest()


def _remove_leftovers(folder: Path) -> None:
    """Unfinished folders of the same cache whose process is gone, or that nobody has written to for a day."""
    for leftover in folder.parent.glob(f"{folder.name}.*.partial"):
        *_, owners, process, _ = leftover.name.split(".")
        try:
            if owners == _processes():
                os.kill(int(process), 0)
            elif time.time() - max(path.stat().st_mtime for path in (leftover, *leftover.iterdir())) > _ABANDONED:
                raise ProcessLookupError
        except ProcessLookupError:
            shutil.rmtree(leftover, ignore_errors=True)
        except (OSError, ValueError):
            pass
