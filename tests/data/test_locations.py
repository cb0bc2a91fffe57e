import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import byte_tokenizer

from lightning_itk.cli.records import check_not_data
from lightning_itk.data import content
from lightning_itk.data.cache import tokenize
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.content import content_hash
from lightning_itk.data.locations import find_files, without_keys
from lightning_itk.data.records import DataError
from lightning_itk.data.sources import Source, read

RECORDS = [{"prompt": f"ask {i}", "completion": f"say {i}"} for i in range(12)]
ENCODER = ChatEncoder(byte_tokenizer())


@pytest.fixture
def memory() -> Iterator[Any]:
    """The file system memory://, empty before and after."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def lines(records: list[Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def parquet(records: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return bytes(sink.getvalue())


def write(root: str, files: dict[str, bytes]) -> None:
    for name, held in files.items():
        with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
            file.write(held)


PARTS = {
    "part-0.jsonl": lines(RECORDS[:3]),
    "part-1.jsonl.gz": gzip.compress(lines(RECORDS[3:5])),
    "part-2.jsonl.zst": zstd(lines(RECORDS[5:7])) + zstd(lines(RECORDS[7:8])),  # two frames, as cat makes them
    "part-3.json.zst": zstd(json.dumps(RECORDS[8:9]).encode()),
    "part-4.jsonl": b"",
    "sub/part-5.parquet": parquet(RECORDS[9:]),
}
BESIDE = {"_SUCCESS": b"", ".part-0.jsonl.crc": b"x", "README.md": b"about", "_old/a.jsonl": b"broken"}


@pytest.mark.parametrize("kind", ["memory://data", "file://", "plain"])
def test_folders_and_globs_are_one_source(kind: str, tmp_path: Path, memory: Any) -> None:
    root = {"file://": f"file://{tmp_path}", "plain": str(tmp_path)}.get(kind, kind)
    write(root, PARTS | BESIDE)
    for path in (root, f"{root}/", f"{root}/*part-*", f"{root}/**/*.[jp]*"):
        path = path.replace("*part-*", "**/part-*")
        found = list(read(Source(path)))
        assert [record.messages[0]["content"] for record in found] == [f"ask {i}" for i in range(12)], path
        assert [record.number for record in found] == list(range(12))
    assert [record.place for record in read(Source(root))][2:6] == [
        "part-0.jsonl line 3", "part-1.jsonl.gz line 1", "part-1.jsonl.gz line 2", "part-2.jsonl.zst line 1"
    ]  # fmt: skip
    assert next(read(Source(f"{root}/sub/*"))).place == "part-5.parquet row 1"
    one = list(read(Source(f"{root}/part-2.jsonl.zst")))
    assert [record.place for record in one] == [f"part-2.jsonl.zst line {i}" for i in (1, 2, 3)]


def test_a_file_with_such_a_name_comes_before_a_glob(tmp_path: Path) -> None:
    write(str(tmp_path), {"a[1].jsonl": lines(RECORDS[:1]), "a1.jsonl": lines(RECORDS)})
    assert len(list(read(Source(str(tmp_path / "a[1].jsonl"))))) == 1
    assert len(list(read(Source(str(tmp_path / "a[12].jsonl"))))) == 12


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "no.jsonl", "{root}/no.jsonl: no such file"),
        ({}, "*.jsonl", r"{root}/\*.jsonl: no data files there, expected some of .json, "),
        ({"a.txt": b"x"}, "", "{root}/: no data files there"),
        ({"a.txt": b"x"}, "a.txt", "{root}/a.txt: 'a.txt' is not a data file, expected one of .json, "),
        ({"a.jsonl": lines(RECORDS), "b.jsonl.bz2": b"x"}, "", "{root}/: 'b.jsonl.bz2' is not a data file"),
        ({"a.jsonl": b""}, "a.jsonl", "{root}/a.jsonl: the file is empty"),
        ({"a.jsonl": lines(RECORDS), "b.jsonl.gz": b""}, "", "{root}/: b.jsonl.gz: the file is empty"),
        ({"a.jsonl": b"", "b.jsonl": b"\n"}, "*", r"\*: the file holds no records"),
        ({"a.jsonl": lines(RECORDS), "b/c.jsonl": b"{}"}, "", "b/c.jsonl line 1: no prompt"),
        (
            {"a.jsonl.gz": gzip.compress(lines(RECORDS) * 9000)[:-999]},
            "a.jsonl.gz",
            r"a.jsonl.gz: cannot be read after line \d+: Compressed file ended before",
        ),
        (
            {"a.jsonl.zst": zstd(lines(RECORDS) * 9000)[:-99]},
            "a.jsonl.zst",
            r"a.jsonl.zst: cannot be read( after line \d+)?: ",
        ),
        ({"a.jsonl.zst": b"no zstd"}, "a.jsonl.zst", "a.jsonl.zst: cannot be read: "),
    ],
)
@pytest.mark.parametrize("kind", ["memory://data", "plain"])
def test_what_cannot_be_read_is_one_line(
    kind: str, files: dict[str, bytes], path: str, message: str, tmp_path: Path, memory: Any
) -> None:
    root = str(tmp_path) if kind == "plain" else kind
    write(root, {"x/.keep": b"so that the folder is there"} | files)
    with pytest.raises(DataError, match=message.format(root=root)) as raised:
        list(read(Source(f"{root}/{path}")))
    assert "\n" not in str(raised.value)


def test_what_is_a_location_and_what_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not Source("org/name").is_file
    for path in ("s3://bucket/folder", "hf://datasets/org/name", "org/*.x", "./org/name", "~/name", "a.jsonl.zst"):
        assert Source(path).is_file
    Path("org/name").mkdir(parents=True)
    assert Source("org/name").is_file


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("s3://key:secret@bucket/a.jsonl", "s3://bucket/a.jsonl"),
        ("https://host/a.jsonl?X-Amz-Signature=secret", "https://host/a.jsonl"),
        ("memory://data/a?.jsonl", "memory://data/a"),
        ("GET https://key:secret@host/a?sig=secret failed", "GET https://host/a failed"),
        ("/home/me@there/what?.jsonl", "/home/me@there/what?.jsonl"),
    ],
)
def test_messages_hold_no_keys(path: str, shown: str) -> None:
    assert without_keys(path) == shown


def test_errors_of_far_away_places_are_one_line_without_keys(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Exception):
        pass

    def refuse(*_: Any, **__: Any) -> Any:
        raise Refused("403 for https://key:secret@host/a.jsonl?sig=secret\nmore")

    write("memory://data", {"a.jsonl": lines(RECORDS)})
    for name, message in (
        ("info", "memory://data/a.jsonl: cannot be looked at: 403"),
        ("open", "a.jsonl: cannot be read: 403"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(type(memory), name, refuse)
            with pytest.raises(DataError, match=f"^{message} for https://host/a.jsonl$"):
                list(read(Source("memory://data/a.jsonl")))
    for path in ("nowhere://key:secret@host/a.jsonl", "s3://key:secret@bucket/a.jsonl"):
        with pytest.raises(DataError) as raised:  # s3 needs a package that is not there
            list(read(Source(path)))
        assert "secret" not in str(raised.value)
        assert "\n" not in str(raised.value)


def test_far_files_are_known_by_their_checksum(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("memory://data", {"a.jsonl": lines(RECORDS[:6]), "b.jsonl": lines(RECORDS[6:])})
    source = Source("memory://data")
    by_content = content_hash(source)
    assert by_content == content_hash(Source("memory://data/*.jsonl"))
    write(str(tmp_path), {"a.jsonl": lines(RECORDS[:6]), "b.jsonl": lines(RECORDS[6:])})
    assert by_content == content_hash(Source(str(tmp_path)))
    write("memory://data", {"b.jsonl": lines(RECORDS[5:])})
    assert content_hash(source) != by_content

    tag = {"/data/a.jsonl": "1", "/data/b.jsonl": "2"}
    plain = type(memory).info
    monkeypatch.setattr(type(memory), "info", lambda self, path, **_: plain(self, path) | {"ETag": tag.get(path)})
    monkeypatch.setattr(content.DataFile, "open", None)
    by_tag = content_hash(source)
    assert by_tag == content_hash(source) != by_content
    tag["/data/b.jsonl"] = "3"
    assert content_hash(source) != by_tag


def test_far_files_without_a_checksum_are_read_once(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("memory://data", {"a.jsonl": lines(RECORDS)})
    monkeypatch.setattr(content, "_SETTLED", -1e9)
    found = content_hash(Source("memory://data/a.jsonl"), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(content.DataFile, "open", None)
        assert content_hash(Source("memory://data/a.jsonl"), tmp_path) == found
    write("memory://data", {"a.jsonl": lines(RECORDS[:5])})
    assert content_hash(Source("memory://data/a.jsonl"), tmp_path) != found


def test_cache_of_several_files(memory: Any, tmp_path: Path) -> None:
    write("memory://data", PARTS)
    write(str(tmp_path / "one"), {"all.jsonl": lines(RECORDS)})
    several = tokenize(Source("memory://data"), ENCODER, 100, cache_dir=tmp_path / "cache", num_proc=1)
    one = tokenize(Source(str(tmp_path / "one/all.jsonl")), ENCODER, 100, cache_dir=tmp_path / "cache", num_proc=1)
    assert several.record.tolist() == one.record.tolist() == list(range(12))
    assert several.summary == one.summary
    assert [several[i].input_ids.tolist() for i in range(12)] == [one[i].input_ids.tolist() for i in range(12)]


def test_only_a_piece_of_a_large_file_is_in_memory(memory: Any) -> None:
    """What is read ahead is bounded, also of a compressed file of another file system."""
    with fsspec.open("memory://data/a.jsonl.zst", "wb") as file:
        file.write(zstd(lines(RECORDS) * 20_000))
    (file,) = find_files("memory://data/a.jsonl.zst")
    with file.open_unpacked() as unpacked:
        next(iter(unpacked))
        before = pa.total_allocated_bytes()
        assert sum(1 for _ in unpacked) == 12 * 20_000 - 1
        assert pa.total_allocated_bytes() - before < 1 << 22


def test_outputs_are_not_taken_for_data(tmp_path: Path) -> None:
    write(str(tmp_path), {"data/a.jsonl": lines(RECORDS)})
    for path, message in (
        ("data/a.jsonl", "is the data itself"),
        ("data", "would be read as data of"),
        ("data/*.jsonl", "would be read as data of"),
    ):
        with pytest.raises(DataError, match=message):
            check_not_data(tmp_path / "data/a.jsonl" if path == "data/a.jsonl" else tmp_path / "data/out.jsonl",
                           [Source(str(tmp_path / path))])  # fmt: skip
    check_not_data(tmp_path / "out.jsonl", [Source(str(tmp_path / "data")), Source("memory://data"), Source("o/n")])
