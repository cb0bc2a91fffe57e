import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fuzz.engine import one_line
from tiny import byte_tokenizer

from lightning_itk.data import blocks, cache, loader
from lightning_itk.data import columns as columns_module
from lightning_itk.data import samples as tokenized
from lightning_itk.data.cache import tokenize
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.loader import SampleSet
from lightning_itk.data.records import DataError
from lightning_itk.data.samples import CUT_OFF, TOO_LONG, TokenizedSource
from lightning_itk.data.sources import Source, read

ENCODER = ChatEncoder(byte_tokenizer())


def records(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {"prompt": f"q{i} " * int(rng.integers(1, 12)), "completion": "answer é " * int(rng.integers(1, 6)) + str(i)}
        | ({"teacher": ("law", "", "shop")[i % 3]} if i % 2 else {})
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return write(tmp_path, records(3000))


def write(folder: Path, items: list[Any], name: str = "data.jsonl") -> Source:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, items)))
    return Source(str(path))


def content(tokenized: TokenizedSource) -> list[Any]:
    samples = [tokenized[i] for i in range(len(tokenized))]
    return [(sample.input_ids.tolist(), sample.spans.tolist()) for sample in samples]


def test_cache_holds_what_the_encoder_gives(tmp_path: Path, source: Source) -> None:
    one = tokenize(source, ENCODER, 60, cache_dir=tmp_path / "one", num_proc=1)
    two = tokenize(source, ENCODER, 60, cache_dir=tmp_path / "two", num_proc=2)
    assert content(one) == content(two)
    assert one.summary == two.summary
    all_records = list(read(source))
    encoded = [e.truncated(60) for e in ENCODER.encode([record.messages for record in all_records])]
    kept = [(record, e) for record, e in zip(all_records, encoded, strict=True) if len(e.spans)]
    assert content(one) == [(e.input_ids.tolist(), e.spans.tolist()) for _, e in kept]
    assert one.record.tolist() == [record.number for record, _ in kept]
    assert one.lengths.tolist() == [len(e.input_ids) for _, e in kept]
    assert one.learned.tolist() == [int((e.labels() != -100).sum()) for _, e in kept]
    assert one.response_chars.tolist() == [len(record.messages[-1]["content"]) for record, _ in kept]
    assert [one.summary.teachers[i] for i in one.teacher] == [record.teacher for record, _ in kept]
    summary = one.summary
    assert (summary.records, summary.samples, summary.dropped) == (3000, len(kept), {CUT_OFF: 3000 - len(kept)})
    assert 0 < summary.dropped[CUT_OFF] < 3000
    assert summary.truncated == sum(e.input_ids[-1] != 201 and len(e.input_ids) == 60 for _, e in kept) > 0
    assert summary.tokens == sum(one.lengths)
    assert summary.learned == sum(one.learned)
    assert summary.max_token_id == max(int(e.input_ids.max()) for _, e in kept)


def test_second_run_tokenizes_nothing(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenize(source, ENCODER, 100, cache_dir=tmp_path / "cache", num_proc=1)
    monkeypatch.setattr(cache, "_build", None)
    again = tokenize(Source(source.path, teacher="x", weight=3.0), ENCODER, 100, cache_dir=tmp_path / "cache")
    assert again.folder == first.folder
    monkeypatch.setenv("ITK_CACHE", str(tmp_path / "cache"))
    assert tokenize(source, ENCODER, 100).folder == first.folder
    renamed = tmp_path / "other.jsonl"
    renamed.write_bytes(Path(source.path).read_bytes())
    assert tokenize(Source(str(renamed)), ENCODER, 100).folder == first.folder


def test_everything_that_matters_changes_the_cache(tmp_path: Path) -> None:
    source = write(tmp_path, records(5))
    other = byte_tokenizer()
    other.chat_template = other.chat_template.replace("\n", " ")
    folders = [
        tokenize(*args, cache_dir=tmp_path, num_proc=1).folder
        for args in [
            (source, ENCODER, 100),
            (source, ENCODER, 99),
            (source, ChatEncoder(other), 100),
            (source, ChatEncoder(byte_tokenizer(extra=("<more>",))), 100),
            (Source(source.path, columns={"response": "prompt"}), ENCODER, 100),
            (write(tmp_path, records(6), "six.jsonl"), ENCODER, 100),
        ]
    ]
    folders.append(tokenize(source, ENCODER, 100, cache_dir=tmp_path, prompts=True).folder)
    assert len(set(folders)) == len(folders)


def test_fingerprint_is_of_the_records_not_of_the_tokenizer(tmp_path: Path) -> None:
    items = records(50)

    def fingerprint(items: list[Any], encoder: ChatEncoder = ENCODER, max_length: int = 100) -> str:
        source = write(tmp_path, items)
        return tokenize(source, encoder, max_length, cache_dir=tmp_path, num_proc=1).summary.fingerprint

    base = fingerprint(items)
    other = byte_tokenizer()
    other.chat_template = None
    assert fingerprint(items, ChatEncoder(other), 60) == base
    as_messages = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in items
    ]
    assert fingerprint(as_messages) == base
    assert fingerprint(items[::-1]) != base
    assert fingerprint(items[:-1]) != base


def test_prompts(tmp_path: Path) -> None:
    source = write(tmp_path, [{"prompt": "q" * 10, "completion": "a"}, {"prompt": "q" * 200}, {"prompt": "why"}])
    tokenized = tokenize(source, ENCODER, 60, cache_dir=tmp_path, prompts=True)
    assert tokenized.summary.dropped == {TOO_LONG: 1}
    assert tokenized.record.tolist() == [0, 2]
    assert tokenized[1].input_ids.tolist() == ENCODER.prompt_ids([{"role": "user", "content": "why"}]).tolist()


@pytest.mark.parametrize("num_proc", [1, 2])
def test_bad_records_leave_nothing_behind(tmp_path: Path, num_proc: int) -> None:
    items = records(4000)
    items[3500]["completion"] = None
    items[3700]["completion"] = None
    with pytest.raises(DataError, match="data.jsonl line 3501: missing response"):
        tokenize(write(tmp_path, items), ENCODER, 100, cache_dir=tmp_path / "cache", num_proc=num_proc)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_record_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('not this') }}{% endif %}{{ m.content }}{% endfor %}"  # noqa: E501
    source = write(tmp_path, [{"prompt": "q", "completion": "yes"}, {"prompt": "q", "completion": "no"}])
    with pytest.raises(DataError, match="data.jsonl line 2: the chat template fails: TemplateError: not this"):
        tokenize(source, ChatEncoder(tokenizer), 100, cache_dir=tmp_path)


def test_disk_full(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, *_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pa, "OSFile", Full)
    with pytest.raises(DataError, match="cannot write the token cache: No space left on device"):
        tokenize(source, ENCODER, 100, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the token cache: (File exists|Not a directory)"):
        tokenize(source, ENCODER, 100, cache_dir=tmp_path / "file")


def test_broken_cache_is_named(tmp_path: Path) -> None:
    tokenized = tokenize(write(tmp_path, records(3)), ENCODER, 100, cache_dir=tmp_path)
    (tokenized.folder / "samples.arrow").write_bytes(b"no arrow")
    with pytest.raises(DataError, match="broken cache .*: delete this folder"):
        TokenizedSource(tokenized.folder)


@pytest.mark.parametrize("name", ["samples.arrow", "summary.json", "columns/tokens_at.npy", "columns/ends.npy"])
def test_no_damage_to_a_cache_is_taken_for_samples(tmp_path: Path, name: str) -> None:
    made = tokenize(write(tmp_path, records(8)), ENCODER, 100, cache_dir=tmp_path)
    file = made.folder / name
    whole, expected = file.read_bytes(), content(made)
    places = range(0, len(whole), 7)
    for damaged in [whole[:0], *(whole[:i] + bytes(4) + whole[i + 4 :] for i in places), *(whole[:i] for i in places)]:
        file.write_bytes(damaged)  # some of it once read memory that is nobody's
        try:
            found = content(TokenizedSource(made.folder))  # spans are looked at when they are read
        except DataError as error:
            one_line(error, f"{made.folder}: broken cache (")
        else:
            assert len(found) == len(expected)
            assert [len(ids) for ids, _ in found] == [len(ids) for ids, _ in expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 7}, "8 samples, the summary says 7"),
        ({"tokens": 1}, "tokens, the summary says 1"),
        ({"records": "8"}, "values of the wrong type"),
        ({"records": 3}, "a record number outside 0 to 2"),
        ({"teachers": ["law"]}, "a teacher number outside 0 to 0"),
        ({"teachers": [1, 2, 3]}, "teachers that are no text"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
    ],
)
def test_a_summary_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    made = tokenize(write(tmp_path, records(8)), ENCODER, 100, cache_dir=tmp_path)
    path = made.folder / "summary.json"
    fields = json.loads(path.read_text()) | change
    path.write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"summary\.json was changed"):
        TokenizedSource(made.folder)
    del fields["check"]
    path.write_text(json.dumps({**fields, "check": tokenized._check_sum(fields)}))
    with pytest.raises(DataError, match=message):
        TokenizedSource(made.folder)


def mapped(column: Any) -> bool:
    """Whether an array is a view of a file."""
    while isinstance(column, np.ndarray) and not isinstance(column, np.memmap):
        column = column.base
    return isinstance(column, np.memmap)


def test_nothing_of_every_sample_is_copied(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run asks of all samples before it begins lies in files that the ranks of a node share."""
    made = tokenize(source, ENCODER, 100, cache_dir=tmp_path)
    one = SampleSet([made], [None])
    columns = (one.lengths, one.learned, one.response_chars, one.digests, one.sample_ids, one.teacher_ids)
    for column in columns:
        assert mapped(column)
    assert one.source_ids.strides == (0,)
    assert len(pickle.dumps(one)) < 2000  # what a spawned loader worker is sent
    again = pickle.loads(pickle.dumps(one))
    assert again.sample_ids.tolist() == one.sample_ids.tolist()
    in_memory = SampleSet([made, made], ["a", None])
    assert not mapped(in_memory.lengths)
    monkeypatch.setattr(loader, "_SHARED_SAMPLES", 1000)
    two = SampleSet([made, made], ["a", None])
    for name in loader._COLUMNS:
        assert mapped(getattr(two, name))
        assert (getattr(two, name) == getattr(in_memory, name)).all()
    with monkeypatch.context() as patch:
        patch.setattr(columns_module, "write_columns", None)  # the next rank writes nothing
        assert mapped(SampleSet([made, made], ["a", None]).digests)
    assert SampleSet([made, made], [None, "b"]).teacher_ids.tolist() != two.teacher_ids.tolist()
    for place in tmp_path.glob("*.columns"):
        (place / "digests.npy").unlink()  # those that map it keep it
        (place / "digests.npy").write_bytes(b"broken")
    again = SampleSet([made, made], ["a", None])
    assert again.digests.tolist() == two.digests.tolist()
    assert two.sample_ids.tolist() == [*made.record.tolist(), *(made.record + 3000).tolist()]
    assert two.source_ids.tolist() == [0] * len(made) + [1] * len(made)
    assert [two.teachers[i] for i in two.teacher_ids[: len(made)]] == ["a"] * len(made)
    assert [two.teachers[i] for i in two.teacher_ids[len(made) :]] == [made.summary.teachers[i] for i in made.teacher]


def test_pages_are_handed_back(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = content(tokenize(source, ENCODER, 100, cache_dir=tmp_path))
    monkeypatch.setattr(tokenized, "_RELEASE_BYTES", 1000)
    assert content(tokenize(source, ENCODER, 100, cache_dir=tmp_path)) == expected


SCRIPT = """
import sys
from fuzz.engine import one_line
from tiny import byte_tokenizer
from lightning_itk.data.cache import tokenize
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.sources import Source
tokenize(Source(sys.argv[1]), ChatEncoder(byte_tokenizer()), 100, cache_dir=sys.argv[2], num_proc=2)
"""


@pytest.mark.process
def test_killed_while_writing(tmp_path: Path) -> None:
    source, folder = write(tmp_path, records(20_000)), tmp_path / "cache"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, source.path, str(folder)], env=environment)
    while not (partial := list(folder.glob("*.partial/samples.arrow"))) or partial[0].stat().st_size < 100_000:
        time.sleep(0.05)
        assert process.poll() is None
    # The kernel names the children of a process here.
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.suffix for path in folder.iterdir() if path.name != "hashes"] == [".partial"]
    small = Source(source.path)
    Path(source.path).write_text("\n".join(map(json.dumps, records(100))))
    tokenize(small, ENCODER, 100, cache_dir=folder, num_proc=1)
    deadline = time.time() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_builds_of_other_machines_and_containers_are_left_alone(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process number means nothing in another container: there it may be alive, here it is nobody."""
    made = tokenize(source, ENCODER, 100, cache_dir=tmp_path)
    name = made.folder.name
    nobody = subprocess.Popen(["true"])
    nobody.wait()
    builds = {owner: tmp_path / f"{name}.{owner}.{nobody.pid}.partial" for owner in (cache._processes(), "0" * 12)}
    old = tmp_path / f"{name}.{'1' * 12}.{nobody.pid}.partial"
    for build in (*builds.values(), old):
        build.mkdir()
        (build / "samples.arrow").write_bytes(b"half")
    for path in (old, old / "samples.arrow"):
        os.utime(path, (0, 0))
    made.folder.rename(tmp_path / "elsewhere")
    again = tokenize(source, ENCODER, 100, cache_dir=tmp_path)
    assert again.folder == made.folder
    assert [path.name for path in tmp_path.glob("*.partial")] == [builds["0" * 12].name]


def test_the_tokenizers_threads_are_off_in_worker_processes_only(tmp_path: Path, monkeypatch) -> None:
    """A few chunks are done in this process, where they are the only parallelism; a fork after them does no harm."""
    work = blocks._work

    def noted(job, chunk):
        with (tmp_path / "seen").open("a") as file:
            file.write(f"{os.getpid() == parent} {os.environ.get('TOKENIZERS_PARALLELISM')}\n")
        return work(job, chunk)

    parent = os.getpid()
    monkeypatch.setattr(blocks, "_work", noted)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    for count, expected in ((600, "True true"), (3000, "False false"), (600, "True true")):
        folder = tmp_path / str(count)
        folder.mkdir(exist_ok=True)
        tokenize(write(folder, records(count)), ENCODER, 60 + len(list(folder.iterdir())), cache_dir=folder, num_proc=2)
        assert {*(tmp_path / "seen").read_text().splitlines()} == {expected}
        (tmp_path / "seen").unlink()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
