"""Tokenized records on disk: made once, in parallel and in bounded memory; `samples.py` reads them.

One folder per source, named after everything its content depends on: the file's bytes, the column map, the tokenizer,
the chat template, the length limit. It appears by a rename when it is complete, so a killed run leaves nothing that
could be taken for a cache.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lightning_itk.data.blocks import Block, Job, arrow_array, blocks_of
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.content import content_hash
from lightning_itk.data.pieces import Pieces, Shard, write_piece
from lightning_itk.data.records import DataError, Fingerprint, Invalid
from lightning_itk.data.samples import SCHEMA, Summary, TokenizedSource, index_samples
from lightning_itk.data.sources import Source, no_records, read_chunks
from lightning_itk.data.tools import Tools

FORMAT_VERSION = 4

_ABANDONED = 24 * 3600  # seconds without a write
_PLACES = 10  # of records that cannot be used are named


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
    root, job = _root(cache_dir), Job(source, encoder, max_length, prompts, invalid, tools)
    folder = _folder(root, job)
    if not folder.exists():
        pieces = Pieces.complete(_pieces(folder))
        _build(folder, job, pieces.blocks() if pieces else _made(job, num_proc), progress)
        shutil.rmtree(_pieces(folder), ignore_errors=True)
    return TokenizedSource(folder)


def tokenize_shard(
    source: Source,
    encoder: ChatEncoder,
    max_length: int,
    shard: Shard,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    num_proc: int | None = None,
    prompts: bool = False,
    invalid: Invalid = "refuse",
    tools: Tools = "refuse",
    progress: bool = True,
) -> list[int]:
    """One shard's part of a cache that several machines make, in a folder that all of them see.

    Each shard writes one piece; whoever finds all of them makes the cache that `tokenize` alone would make, to the
    byte. Shards may run at any time, in any order, again, and twice at once; a killed one leaves nothing in the way.

    Args:
        shard: which part of how many. With at least so many files as shards each takes whole files, and reads no
            others; with fewer each reads all, and tokenizes its part of them.

    The others are as for `tokenize`.

    Returns:
        The numbers of the shards that are missing still; none = the cache is there.

    Raises:
        DataError: as `tokenize`.
    """
    root, job = _root(cache_dir), Job(source, encoder, max_length, prompts, invalid, tools)
    folder = _folder(root, job)
    pieces = _pieces(folder)
    with _unless_there(folder):
        if not folder.exists() and not shard.piece(pieces).exists():
            write_piece(pieces, shard, _made(job, num_proc, shard))
    missing = shard.missing(pieces)
    if not folder.exists():  # asked after the pieces, which go when it is there
        if missing:
            return missing
        _build(folder, job, Pieces(pieces, shard.count).blocks(), progress)
    shutil.rmtree(pieces, ignore_errors=True)
    return []


def hash_notes(cache_dir: str | os.PathLike[str] | None) -> Path:
    """The folder of hashes of files that were read before."""
    return _root(cache_dir) / "hashes"


def _root(cache_dir: str | os.PathLike[str] | None) -> Path:
    return Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()


def _folder(root: Path, job: Job) -> Path:
    """Where the cache is, named after all that it depends on."""
    source = job.source
    parts: list[Any] = [FORMAT_VERSION, content_hash(source, hash_notes(root))]
    parts += [source.files()[0].kind if source.is_file else source.split, sorted((source.columns or {}).items())]
    parts += [job.encoder.fingerprint(), job.max_length, job.prompts]
    parts += [job.invalid] if job.invalid != "refuse" else []
    parts += ["tools", job.tools] if job.tools != "refuse" else []
    return root / hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _pieces(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.pieces")


def _made(job: Job, num_proc: int | None, shard: Shard | None = None) -> Iterator[Block]:
    """Blocks from the records themselves; of a shard, with numbers of records that count in each part of the source."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chunks = shard.chunks(job.source) if shard else read_chunks(job.source)
    return blocks_of(job, chunks, num_proc or cores)


@contextlib.contextmanager
def _unless_there(folder: Path) -> Iterator[None]:
    """What goes wrong in making a cache, as one line; nothing of it counts if another process has made the cache."""
    try:
        yield
    except (OSError, DataError, BrokenProcessPool) as error:
        if folder.exists():
            return
        if isinstance(error, BrokenProcessPool):
            raise DataError("a tokenizing worker was killed (out of memory?): try a smaller num_proc") from None
        if isinstance(error, OSError):
            raise DataError(f"{folder.parent}: cannot write the token cache: {error.strerror or error}") from error
        raise


def _build(folder: Path, job: Job, blocks: Iterable[Block], progress: bool) -> None:
    partial = folder.with_name(f"{folder.name}.{_processes()}.{os.getpid()}.partial")
    try:
        with _unless_there(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
            partial.mkdir()
            with pa.OSFile(str(partial / "samples.arrow"), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
                summary = _write(writer, job.source, blocks, progress)
            index_samples(partial)
            (partial / "summary.json").write_text(summary.to_json())
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(writer: pa.RecordBatchFileWriter, source: Source, blocks: Iterable[Block], progress: bool) -> Summary:
    summary, fingerprint = Summary(), Fingerprint()
    tags: dict[str, int] = {}
    columns = [SpinnerColumn(), TextColumn("tokenizing {task.description}"), MofNCompleteColumn(), TimeElapsedColumn()]
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
        task = bar.add_task(source.name, total=None)
        for block in blocks:
            teacher = np.array([tags.setdefault(tag, len(tags)) for tag in block.tags], np.int32)
            arrays = {**block.columns, "teacher": teacher}
            if block.counts["samples"]:
                writer.write_batch(pa.record_batch([arrow_array(arrays[name]) for name in SCHEMA.names], schema=SCHEMA))
            for name in ("records", "samples", "truncated", "tokens", "learned", "unfinished"):
                setattr(summary, name, getattr(summary, name) + block.counts[name])
            summary.max_token_id = max(summary.max_token_id, block.counts["max_token_id"])
            for reason, count in block.dropped.items():
                summary.dropped[reason] = summary.dropped.get(reason, 0) + count
            summary.invalid += block.invalid[: _PLACES - len(summary.invalid)]
            fingerprint.add(block.digests)
            bar.update(task, completed=summary.records)
    if not summary.records:
        raise no_records(source)
    summary.teachers, summary.fingerprint = list(tags), str(fingerprint)
    return summary


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
