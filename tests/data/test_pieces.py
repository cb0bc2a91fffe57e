import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny import byte_tokenizer

from lightning_itk.data import blocks, cache, pieces, sources
from lightning_itk.data.cache import tokenize, tokenize_shard
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.pieces import Shard
from lightning_itk.data.records import DataError
from lightning_itk.data.sources import Source

ENCODER = ChatEncoder(byte_tokenizer())


def record(number: int) -> dict[str, Any]:
    tag = {"teacher": ("law", "", "shop")[number // 7 % 3]} if number > 40 else {}
    return {"prompt": f"ask {number} " * (number % 9 + 1), "completion": "" if number % 31 == 5 else "say é"} | tag


def write(folder: Path, sizes: list[int]) -> Source:
    """A folder of files, the records one after the other; a size of 0 is a file without a record."""
    folder.mkdir()
    first = 0
    for number, size in enumerate(sizes):
        lines = [json.dumps(record(i)) + "\n" for i in range(first, first + size)]
        (folder / f"{number:03}.jsonl").write_text("".join(lines))
        first += size
    return Source(str(folder))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_CHUNK_RECORDS", 16)


OPTIONS: dict[str, Any] = {"num_proc": 1, "invalid": "drop"}


def shard(source: Source, folder: Path, number: int, count: int) -> list[int]:
    return tokenize_shard(source, ENCODER, 60, Shard(number, count), cache_dir=folder, **OPTIONS)


def files(folder: Path) -> dict[str, bytes]:
    """All that is in a folder of caches, whatever the notes of hashes."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("hashes")}


@pytest.mark.parametrize("sizes", [[100], [40, 0, 1, 50, 33], [3] * 40], ids=["one file", "few files", "many files"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_shards_make_the_cache_of_one_process_to_the_byte(sizes: list[int], count: int, tmp_path: Path) -> None:
    source = write(tmp_path / "data", sizes)
    alone = tokenize(source, ENCODER, 60, cache_dir=tmp_path / "alone", **OPTIONS)
    assert alone.summary.dropped
    assert len(alone.summary.teachers) == 3
    order = [3, 0, 6, 5, 1, 4, 2] if count == 7 else list(range(count))
    waiting = [shard(source, tmp_path / "shards", number, count) for number in order]
    assert waiting == [sorted(order[done:]) for done in range(1, count + 1)]
    assert files(tmp_path / "shards") == files(tmp_path / "alone")


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_list([record(i) for i in range(80)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    source = Source("org/name")
    tokenize(source, ENCODER, 60, cache_dir=tmp_path / "alone", **OPTIONS)
    assert [shard(source, tmp_path / "shards", number, 2) for number in (1, 0)] == [[0], []]
    assert files(tmp_path / "shards") == files(tmp_path / "alone")


def test_with_enough_files_a_shard_reads_its_own_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "data", [3] * 5)
    read: list[str] = []
    plain = sources.read_file
    monkeypatch.setattr(sources, "read_file", lambda file: read.append(file.name) or plain(file))
    shard(source, tmp_path / "cache", 1, 2)
    assert read == ["001.jsonl", "003.jsonl"]


def test_shards_may_be_killed_and_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "data", [40, 50])
    folder = tmp_path / "shards"
    work = blocks._work

    def die(job: Any, chunk: Any) -> Any:
        if chunk.at == (1, 1):
            raise KeyboardInterrupt
        return work(job, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_work", die)
        with pytest.raises(KeyboardInterrupt):
            shard(source, folder, 1, 2)
    (made,) = folder.glob("*.pieces")
    assert list(made.iterdir()) == []
    (made / ".left.tmp").write_bytes(b"half of a piece")  # of a kill that cannot be caught
    assert shard(source, folder, 0, 2) == [1]
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_work", None)  # nothing is made again
        assert shard(source, folder, 0, 2) == [1]
    assert shard(source, folder, 1, 2) == []
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_work", None)
        assert shard(source, folder, 0, 2) == []
        assert shard(source, folder, 2, 5) == []
    tokenize(source, ENCODER, 60, cache_dir=tmp_path / "alone", **OPTIONS)
    assert files(folder) == files(tmp_path / "alone")


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_fit_makes_the_cache_when_it_finds_all_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "data", [40, 50])
    folder = tmp_path / "shards"
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_build", lambda *_: pytest.fail("a cache without all pieces"))
        assert [shard(source, folder, number, 3) for number in (0, 1)] == [[1, 2], [2]]
        patch.setattr(cache, "_build", killed)
        with pytest.raises(KeyboardInterrupt):
            shard(source, folder, 2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_work", None)
        tokenize(source, ENCODER, 60, cache_dir=folder, **OPTIONS)
    tokenize(source, ENCODER, 60, cache_dir=tmp_path / "alone", **OPTIONS)
    assert files(folder) == files(tmp_path / "alone")


def test_fit_does_not_wait_for_shards(tmp_path: Path) -> None:
    source = write(tmp_path / "data", [40, 50])
    assert shard(source, tmp_path / "shards", 0, 3) == [1, 2]
    tokenize(source, ENCODER, 60, cache_dir=tmp_path / "shards", **OPTIONS)
    assert not list((tmp_path / "shards").glob("*.pieces"))
    assert shard(source, tmp_path / "shards", 1, 3) == []


@pytest.mark.parametrize("when", ["write_piece", "Pieces"])
def test_two_that_find_all_pieces_at_once(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one finds the pieces gone, while it writes its own or reads all; the cache is there."""
    source = write(tmp_path / "data", [40, 50])
    folder = tmp_path / "shards"
    assert shard(source, folder, 0, 2) == [1]
    plain = getattr(pieces, when)

    def slow(*given: Any) -> Any:
        monkeypatch.setattr(cache, when, plain)
        assert shard(source, folder, 1, 2) == []
        return plain(*given)

    monkeypatch.setattr(cache, when, slow)
    assert shard(source, folder, 1, 2) == []
    monkeypatch.setattr(blocks, "_work", None)
    tokenize(source, ENCODER, 60, cache_dir=folder, **OPTIONS)
    assert not list(folder.glob("*.p*"))


def test_broken_pieces_are_named(tmp_path: Path) -> None:
    source = write(tmp_path / "data", [40, 50])
    assert shard(source, tmp_path / "cache", 0, 2) == [1]
    (piece,) = (tmp_path / "cache").rglob("*.arrow")
    whole = piece.read_bytes()
    for damaged in (b"", b"no arrow", whole[: len(whole) // 2], whole[:-30]):
        piece.write_bytes(damaged)
        with pytest.raises(DataError, match="0-of-2.arrow: broken piece .*: delete it"):
            shard(source, tmp_path / "cache", 1, 2)


def test_bad_records_stop_their_shard_only(tmp_path: Path) -> None:
    source = write(tmp_path / "data", [40, 50])
    strict = OPTIONS | {"invalid": "refuse", "cache_dir": tmp_path / "cache"}
    for files_of, line in ((0, "000.jsonl line 6: empty response"), (1, "001.jsonl line 28: empty response")):
        with pytest.raises(DataError, match=line):
            tokenize_shard(source, ENCODER, 60, Shard(files_of, 2), **strict)
    empty = write(tmp_path / "empty", [0, 0])
    assert shard(empty, tmp_path / "cache", 0, 2) == [1]
    with pytest.raises(DataError, match="empty: the file holds no records"):
        shard(empty, tmp_path / "cache", 1, 2)


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/4", "1/0", "1/2/3", ""])
def test_bad_shards(text: str) -> None:
    with pytest.raises(DataError, match="expected i/n with i from 0 to n-1"):
        Shard.parse(text)
    assert str(Shard.parse(" 3/4 ")) == "3/4"
