import gzip
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_itk.data import content
from lightning_itk.data.content import content_hash
from lightning_itk.data.records import DataError, Record
from lightning_itk.data.sources import Source, as_sources, read, read_chunks

ALPACA = [{"instruction": f"do {i}\n", "input": "é ]," * i, "output": f"done {i} {{"} for i in range(7)]
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str | bytes, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


def lines(records: list[Any]) -> str:
    return "\n".join(map(json.dumps, records))


def test_all_file_kinds_give_the_same_records(tmp_path: Path, write: Write) -> None:
    paths = [
        write(lines(ALPACA), "a.jsonl"),
        write("\ufeff" + lines(ALPACA).replace("\n", "\r\n\r\n") + "\n", "a.ndjson"),
        write(json.dumps(ALPACA, indent=2, ensure_ascii=False), "a.json"),
        write("\ufeff" + json.dumps(ALPACA), "b.json"),
        write(lines(ALPACA), "lines.json"),
        write(gzip.compress(lines(ALPACA).encode()), "a.jsonl.gz"),
        write(gzip.compress(json.dumps(ALPACA).encode()), "a.json.gz"),
        str(tmp_path / "a.parquet"),
    ]
    pq.write_table(pa.Table.from_pylist(ALPACA), paths[-1])
    expected = [record.messages for record in read(Source(paths[0]))]
    assert expected[1] == [
        {"role": "user", "content": "do 1\n\n\né ],", "instruction": "do 1\n", "input": "é ],"},
        {"role": "assistant", "content": "done 1 {"},
    ]
    for path in paths:
        records = list(read(Source(path)))
        assert [record.messages for record in records] == expected, path
        assert [record.number for record in records] == list(range(7))
    assert next(read(Source(paths[0]))).place == "a.jsonl line 1"


def test_long_lists_are_read_in_pieces(write: Write) -> None:
    many = [{"prompt": "p" * 300, "completion": f"{i}\n" * 100} for i in range(4000)]
    path = write(json.dumps(many, indent=1), "many.json")
    records = list(read(Source(path)))
    assert len(records) == 4000
    assert all(record.messages[1]["content"] == f"{i}\n" * 100 for i, record in enumerate(records))
    assert max(len(chunk.raw) for chunk in read_chunks(Source(path))) <= 512


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "q", "context": "c", "response": "a"}, ["q\n\nc", "a"]),
        ({"instruction": "q", "context": None, "response": "a"}, ["q", "a"]),
        ({"prompt": "q", "completion": "a", "text": 3}, ["q", "a"]),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": "a"}, ["q", "a"]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ["q", "a"]),
        (
            {"messages": [{"role": r, "content": c} for r, c in [("user", "q"), ("assistant", "a"), ("user", "?")]]},
            ["q", "a"],
        ),
        ({"system": "s", "instruction": "q", "output": "a"}, ["s", "q", "a"]),
    ],
)  # fmt: skip
def test_forms(write: Write, record: dict[str, Any], expected: list[str]) -> None:
    messages = next(read(Source(write(lines([record]))))).messages
    assert [message["content"] for message in messages] == expected
    assert messages[-1]["role"] == "assistant"


def test_columns_and_teacher_tags(write: Write) -> None:
    path = write(
        lines([{"frage": "q", "answer": "a", "output": "not me", "dom": 1}, {"frage": "q", "answer": "b", "dom": 0}])
    )
    columns = {"instruction": "frage", "response": "answer", "is_domain": "dom"}
    records = list(read(Source(path, columns=columns)))
    assert [record.messages[-1]["content"] for record in records] == ["a", "b"]
    assert [record.teacher for record in records] == ["expert", "reference"]
    path = write(
        lines(
            [
                {"prompt": "q", "completion": "a", "teacher": "law", "is_domain": True},
                {"prompt": "q", "completion": "a"},
            ]
        )
    )
    assert [record.teacher for record in read(Source(path))] == ["law", ""]


def test_prompts_need_no_response(write: Write) -> None:
    path = write(lines([{"prompt": "q"}, {"prompt": "q", "completion": "a"}]))
    for record in read(Source(path), need_response=False):
        assert [message["role"] for message in record.messages] == ["user"]


GOOD = '{"prompt": "q", "completion": "a"}'


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "the file is empty"),
        (" \n\n", "holds no records"),
        (GOOD + '\n{"prompt": "q", "completion": }', "data.jsonl line 2: broken JSON: Expecting value at character 31"),
        ("[1]", "data.jsonl line 1: the record is a list, expected an object"),
        (GOOD.encode() + b'\n{"prompt": "\xff"}', "line 2: not UTF-8 text: byte 0xff at byte 13"),
        ('{"prompt": "q"}', "line 1: missing response: expected one of response, output, completion, found prompt"),
        ('{"prompt": "q", "completion": ""}', "empty response"),
        ('{"prompt": "q", "completion": " \\n"}', "empty response"),
        ('{"prompt": "q", "completion": 3}', "field 'completion' is a number, expected text"),
        ('{"prompt": 1.5, "completion": "a"}', "field 'prompt' is a number, expected text"),
        ('{"text": "a"}', "no prompt: expected a field instruction, prompt or messages"),
        ('{"messages": "hello"}', "field 'messages' is text, expected a list"),
        ('{"messages": ["hello"]}', "message 1 of 'messages' is text, expected an object"),
        ('{"messages": [{"role": "wizard", "content": "a"}]}', "unknown role 'wizard', expected one of system, user"),
        ('{"messages": [{"role": "user", "content": null}]}', "content is missing, expected text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
        ('{"messages": []}', "no assistant turn"),
        ('{"messages": [{"role": "assistant", "content": " "}]}', "empty response"),
        ('{"prompt": "\\ud800", "completion": "a"}', "not valid Unicode"),
        ('{"prompt": "q", "completion": "a", "is_domain": "yes"}', "'is_domain' is 'yes', expected 0, 1"),
        ('{"prompt": "q", "completion": "a", "teacher": 3}', "'teacher' is a number, expected text"),
    ],
)  # fmt: skip
def test_bad_records_are_one_clear_line(write: Write, text: str | bytes, error: str) -> None:
    with pytest.raises(DataError) as raised:
        list(read(Source(write(text))))
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[", "line 1: broken JSON: the list does not end"),
        ("[]", "holds no records"),
        (f"[{GOOD},", "the list does not end"),
        (f"[{GOOD}\n{GOOD}]", "record 1: broken JSON: expected , or ]"),
        (f"[{GOOD},\n{GOOD},\n{{]", "line 3: broken JSON: Expecting property name"),
        (f"[{GOOD}] more", "text after the list"),
        ("[1]", "record 1: the record is a number"),
        (b'[{"prompt": "\xff', "data.json record 1: not UTF-8 text: byte 0xff"),
        (
            f"[{GOOD}, {GOOD}".encode() + b',{"prompt": "\xe9t\xe9"}, 9]',
            "record 3: not UTF-8 text: byte 0xe9",
        ),
        (f"[{GOOD}, ".encode() + b"\xff]", "data.json record 2: not UTF-8 text: byte 0xff"),
        (f"[{GOOD}, ".encode() + b'{broken}, "\xff"]', "data.json line 1: broken JSON: Expecting property"),
    ],
)
def test_bad_lists(write: Write, text: str | bytes, error: str) -> None:
    with pytest.raises(DataError) as raised:
        list(read(Source(write(text, "data.json"))))
    assert error in str(raised.value)


def test_bad_sources(tmp_path: Path, write: Write) -> None:
    for path, error in [
        (str(tmp_path / "none.jsonl"), "no such file"),
        ("missing.parquet", "no such file"),
        (write("a,b", "data.csv"), "not a data file, expected one of .json"),
        (write("no parquet", "data.parquet"), "data.parquet: cannot be read"),
        (write(gzip.compress(lines(ALPACA).encode())[:-12], "cut.jsonl.gz"), "cut.jsonl.gz: cannot be read"),
        (write(b"no gzip", "no.jsonl.gz"), "no.jsonl.gz: cannot be read"),
    ]:
        with pytest.raises(DataError) as raised:
            list(read(Source(path)))
        assert error in str(raised.value)
    with pytest.raises(DataError, match="unknown key 'answer' in columns, expected one of messages"):
        Source("a.jsonl", columns={"answer": "response"}).check()
    with pytest.raises(DataError, match="weight is 0"):
        Source("a.jsonl", weight=0).check()
    with pytest.raises(DataError, match="no column 'answer' .columns maps response to it., found prompt"):
        list(read(Source(write('{"prompt": "q"}'), columns={"response": "answer"})))


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, split: str) -> datasets.Dataset:
        if path != "someone/alpaca":
            raise FileNotFoundError(f"{path} is not on the hub\nand more lines")
        return datasets.Dataset.from_list(ALPACA if split == "train" else ALPACA[:2])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = list(read(Source("someone/alpaca")))
    assert len(records) == 7
    assert records[1].place == "someone/alpaca record 2"
    assert len(list(read(Source("someone/alpaca", split="test")))) == 2
    assert content_hash(Source("someone/alpaca")) != content_hash(Source("someone/alpaca", split="test"))
    with pytest.raises(DataError, match="neither a file nor a hub data set that can be loaded: someone/none is not on"):
        list(read(Source("someone/none")))


def test_content_hash_is_of_the_content(write: Write) -> None:
    a, b, c = write("a", "a.jsonl"), write("a", "b.jsonl"), write("b", "c.jsonl")
    assert content_hash(Source(a)) == content_hash(Source(b)) != content_hash(Source(c))


def test_a_file_is_read_for_its_hash_once(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All other ranks, and later runs, take what was noted, until the file is another one."""
    reads = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: reads.append(file.name) or digest(file, kind))
    source, notes = Source(write("aaaa", "a.jsonl")), tmp_path / "notes"
    assert content_hash(source, notes) == content_hash(source, notes)
    assert len(reads) == 2
    assert not notes.exists()  # it was just written: another change could bear the same date
    monkeypatch.setattr(content, "_SETTLED", -1)
    first = content_hash(source, notes)
    assert content_hash(source, notes) == first
    assert len(reads) == 3
    dates = os.stat(source.path)
    write("bbbb", "a.jsonl")
    os.utime(source.path, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    assert content_hash(source, notes) == content_hash(source) != first
    (note,) = notes.iterdir()
    note.write_text("{")
    assert content_hash(source, notes) == content_hash(source)
    assert content_hash(source, Path(source.path)) == content_hash(source)  # nowhere to note it


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"system": "s", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "sqa"),
        ({"instruction": "q", "output": "a", "system": "s", "history": [["x", "y"], ["z", "w"]]}, "sxyzwqa"),
        ({"instruction": "q", "output": "a", "history": []}, "qa"),
        ({"prompt": [{"role": "user", "content": "q"}], "context": "", "completion": "a"}, "qa"),
    ],
)
def test_no_field_is_lost(write: Write, record: Any, expected: str) -> None:
    (found,) = read(Source(write(lines([record]))))
    assert "".join(message["content"] for message in found.messages) == expected
    assert (found.messages[0]["role"] == "system") == (expected[0] == "s")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": [{"role": "user", "content": "q"}], "context": "c", "completion": "a"}, "'context' beside a conv"),
        ({"instruction": [], "output": "a"}, "'instruction' is an empty list"),
        ({"system": "s", "messages": [{"role": "system", "content": "t"}]}, "'system' beside a message of the role"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "'history': turn 1 is a list, expected .what was"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 2}]}, "weight is 2, expected 0 or 1"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": "0"}]}, "weight is '0', expected 0 or 1"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "every assistant turn has weight 0"),
    ],
)
def test_what_would_be_lost_is_refused(write: Write, record: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read(Source(write(lines([record])))))


def test_digests_tell_conversations_apart() -> None:
    def digest(*messages: tuple[str, str]) -> bytes:
        return Record([{"role": r, "content": c} for r, c in messages], "", 0, "").digest()

    one, two = ("user", "a"), ("assistant", "b")
    assert digest(one, two) != digest(("user", "a\x1eassistant\x1fb"))
    assert digest(("user", "a\x1eb")) != digest(("user", "a"), ("b", ""))
    plain = hashlib.blake2b(b"user\x1fa\x1eassistant\x1fb", digest_size=16).digest()
    assert digest(one, two) == plain  # what scores files and caches of version 0.1 hold


DEEP, LONG = '{"a": ' * 30_000 + "1" + "}" * 30_000, '{"prompt": "q", "completion": "a", "n": ' + "7" * 5000 + "}"


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (DEEP, "d.jsonl", "d.jsonl line 1: broken JSON: nested too deeply"),
        (f"[{DEEP}]", "d.json", "d.json record 1: broken JSON: nested too deeply"),
        (LONG, "d.jsonl", "d.jsonl line 1: broken JSON: a number with too many digits"),
        (f"[{LONG}]", "d.json", "d.json record 1: broken JSON: a number with too many digits"),
    ],
)
def test_what_no_parser_takes_is_one_line(write: Write, text: str, name: str, message: str) -> None:
    with pytest.raises(DataError) as raised:
        list(read(Source(write(text, name))))
    assert str(raised.value) == message


def test_dates_beyond_python_and_broken_parquet_are_one_line(tmp_path: Path, write: Write) -> None:
    far = pa.array([2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"prompt": ["q"], "completion": ["a"], "when": far}), tmp_path / "far.parquet")
    for path in (str(tmp_path / "far.parquet"), write("PAR1 no", "junk.parquet")):
        with pytest.raises(DataError, match=r"^\w+\.parquet: cannot be read: ") as raised:
            list(read(Source(path)))
        assert "\n" not in str(raised.value)


def test_sources_of_the_wrong_type() -> None:
    for options, message in (
        ({"path": 5}, "path is 5, expected text"),
        ({"path": "a", "columns": True}, "a: columns is True, expected a map"),
        ({"path": "a", "columns": {"response": 3}}, "columns maps response to 3, expected text"),
        ({"path": "a", "teacher": ["b"]}, "teacher is ..b.., expected text"),
        ({"path": "a", "split": None}, "split is None, expected text"),
        ({"path": "a", "weight": "2"}, "weight is '2'"),
    ):
        with pytest.raises(DataError, match=message):
            as_sources(options)


@pytest.mark.parametrize(
    "record",
    [
        {"line\nbreak": 1},
        {"\x1e": 1},
        {f"field {i}": "x" for i in range(10_000)},
        {"x" * 10_000: 1},
        {"messages": [{"role": "long " * 1000, "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "a", "weight": ["long"] * 1000}]},
        {"prompt": "q", "completion": "a", "is_domain": "long " * 1000},
    ],
)
def test_what_is_shown_of_a_record_is_one_short_line(write: Write, record: Any) -> None:
    with pytest.raises(DataError) as raised:
        list(read(Source(write(lines([record])))))
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 1000


def test_a_broken_byte_far_into_a_list_is_told_by_its_record(write: Write) -> None:
    """The records before it in the same block of the file are not yet parsed when the block is decoded."""
    records = [{"prompt": f"p{i}", "completion": "é" * 50} for i in range(9000)]
    text = json.dumps(records, ensure_ascii=False).encode().replace(b"p8000", b"p\x80")
    with pytest.raises(DataError, match=r"^data.json record 8001: not UTF-8 text: byte 0x80$"):
        list(read(Source(write(text, "data.json"))))
