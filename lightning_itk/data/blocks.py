"""Chunks of records become blocks of samples, in this process or in several, in order."""

import contextlib
import multiprocessing
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lightning_itk.data.chat import ChatEncoder, Encoded
from lightning_itk.data.records import DataError, Invalid, Record
from lightning_itk.data.samples import CUT_OFF, TOO_LONG
from lightning_itk.data.sources import Chunk, Source, parse_chunk
from lightning_itk.data.tools import Tools

_IN_PROCESS_CHUNKS = 4  # so few chunks are done before worker processes have started


class Job(NamedTuple):
    """How the records of a source are tokenized; the arguments of `cache.tokenize`."""

    source: Source
    encoder: ChatEncoder
    max_length: int
    prompts: bool
    invalid: Invalid
    tools: Tools


class Block(NamedTuple):
    """The samples of one chunk, and what its records came to."""

    at: tuple[int, int]  # the number of the part of the source, and of the chunk in it
    columns: dict[str, Any]  # name -> array, or (offsets, values) of a list
    tags: list[str]  # one per sample
    digests: bytes  # 16 per record
    counts: Counter[str]
    dropped: Counter[str]
    invalid: list[str]  # place and reason of records that cannot be used


def _work(job: Job, chunk: Chunk) -> Block:
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
    return Block(chunk.at, columns, [record.teacher for record, _ in kept], b"".join(digests), counts, dropped, invalid)


def _encode(job: Job, records: list[Record]) -> tuple[list[tuple[Record, Encoded]], list[Record]]:
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


def arrow_array(column: Any) -> pa.Array:
    """A column of a block."""
    if isinstance(column, tuple):
        return pa.ListArray.from_arrays(*map(pa.array, column))
    return pa.array(column)


def blocks_of(job: Job, given: Iterable[Chunk], num_proc: int) -> Iterator[Block]:
    """Chunks through the workers, in order; only a few per worker are in memory at a time."""
    chunks = iter(given)
    first = list(islice(chunks, _IN_PROCESS_CHUNKS + 1))
    if num_proc == 1 or len(first) <= _IN_PROCESS_CHUNKS:
        yield from (_work(job, chunk) for chunk in chain(first, chunks))
        return
    # fork shares the tokenizer and needs no `if __name__ == "__main__"` in the user's script. The workers touch
    # neither CUDA nor torch; elsewhere than on Linux fork is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with _tokenizer_threads_off():
        pool = ProcessPoolExecutor(num_proc, context, _start_worker, (job,))
        waiting: deque[Future[Block]] = deque()
        try:
            for chunk in chain(first, chunks):
                waiting.append(pool.submit(_work_here, chunk))
                if len(waiting) > 2 * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_job: Job


def _start_worker(job: Job) -> None:
    global _job
    _job = job
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            wait([parent.sentinel])
            os._exit(1)  # the parent was killed: do not wait for work that never comes

    threading.Thread(target=follow, daemon=True).start()


def _work_here(chunk: Chunk) -> Block:
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
