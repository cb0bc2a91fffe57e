"""The scores file: round trips, adding epochs, and every refusal."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz.engine import one_line

from lightning_itk.selection import scores as scores_module
from lightning_itk.selection.scores import append_epoch, check_records, read_meta, read_scores, write_scores

META = {"fingerprint": "abc", "tokenizer": "bytes", "template": "chatml", "model": "tiny", "extra": [1, 2]}


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    losses = random.random((3, 50)).astype(np.float32)
    tokens = random.integers(0, 4, 50)
    losses[:, tokens == 0] = np.nan
    return np.arange(50) * 2, tokens, losses


@pytest.fixture
def path(tmp_path, arrays):
    write_scores(tmp_path / "new" / "scores.parquet", *arrays, META)
    return tmp_path / "new" / "scores.parquet"


def test_round_trip(path, arrays):
    read = read_scores(path)
    for found, written in zip((read.record, read.tokens, read.losses), arrays, strict=True):
        np.testing.assert_array_equal(found, written)
    assert read.losses.dtype == np.float32
    assert read.epochs == 2
    assert read.meta == {**META, "format": 1, "epochs": 2} == read_meta(path)
    assert [p.name for p in path.parent.iterdir()] == ["scores.parquet"]


def test_float64_stays(tmp_path, arrays):
    write_scores(tmp_path / "s.parquet", arrays[0], arrays[1], arrays[2].astype(np.float64) / 3, META)
    assert read_scores(tmp_path / "s.parquet").losses.dtype == np.float64


def test_only_the_epochs_needed(path, arrays):
    np.testing.assert_array_equal(read_scores(path, epochs=1).losses, arrays[2][:2])
    with pytest.raises(ValueError, match="holds 2 epochs of losses, 3 are needed"):
        read_scores(path, epochs=3)


def test_many_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(scores_module, "_ROWS", 7)
    random = np.random.default_rng(0)
    losses = random.random((2, 100))
    write_scores(tmp_path / "s.parquet", np.arange(100), np.ones(100), losses, META)
    new = random.random(100)
    assert append_epoch(tmp_path / "s.parquet", new) == 2
    read = read_scores(tmp_path / "s.parquet")
    np.testing.assert_array_equal(read.losses, [*losses, new])
    np.testing.assert_array_equal(read.record, np.arange(100))


def test_append_epoch_keeps_the_rest(path, arrays):
    new = np.random.default_rng(1).random(50)
    assert append_epoch(path, new, {"model": "tiny, later"}) == 3
    read = read_scores(path)
    np.testing.assert_array_equal(read.losses, [*arrays[2], new.astype(np.float32)])
    assert read.meta == {**META, "model": "tiny, later", "format": 1, "epochs": 3}
    with pytest.raises(ValueError, match=r"50 records, but losses of shape \(49,\)"):
        append_epoch(path, new[:-1])
    with pytest.raises(ValueError, match="covers 3 epochs, so the next is not epoch 3"):
        append_epoch(path, new, epoch=3)
    assert append_epoch(path, new, epoch=4) == 4


def test_a_failed_write_leaves_the_old_file(path, arrays, monkeypatch):
    before = path.read_bytes()
    bad = arrays[2].copy()
    bad[1, 7] = np.inf
    with pytest.raises(ValueError, match="infinite"):
        write_scores(path, arrays[0], arrays[1], bad, META)
    with pytest.raises(ValueError, match="infinite"):
        append_epoch(path, bad[1])
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ValueError, match=r"scores\.parquet: cannot be written: disk full"):
        append_epoch(path, arrays[2][0])
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["scores.parquet"]


def test_no_records(tmp_path):
    write_scores(tmp_path / "s.parquet", [], [], np.empty((2, 0)), META)
    assert read_scores(tmp_path / "s.parquet").losses.shape == (2, 0)


def test_scores_of_other_records_are_refused(path):
    read = read_scores(path)
    check_records(read, "abc", 50)
    check_records(read.meta, "abc")
    with pytest.raises(ValueError, match=r"other records or in another order \(fingerprint abc, the data has xyz\)"):
        check_records(read, "xyz")
    with pytest.raises(ValueError, match="holds 50 records, the data has 51"):
        check_records(read, "abc", 51)


def _write(path, names, meta, kinds=None):
    table = pa.table({name: pa.array([1], (kinds or {}).get(name, pa.int64())) for name in names})
    pq.write_table(table.replace_schema_metadata(meta), path)


NOTED = {b"itk": json.dumps({**META, "format": 1, "epochs": 0}).encode()}


@pytest.mark.parametrize(
    ("names", "meta", "message"),
    [
        (["record", "tokens"], {}, "not a scores file"),
        (["record", "tokens"], NOTED, "column loss_0 is missing, found record, tokens"),
        (["record", "tokens", "loss_0"], NOTED, "column loss_0 holds int64"),
        (["record"], {b"itk": b"no json"}, "broken 'itk' metadata"),
        (["record"], {b"itk": b"[]"}, "broken 'itk' metadata"),
        (["record"], {b"itk": b'{"format": 1, "epochs": 0}'}, "broken 'itk' metadata.*fingerprint"),
        (["record"], {b"itk": b'{"format": 9, "epochs": 0, "fingerprint": ""}'}, "format 9 of the scores file"),
        (
            ["record"],
            {b"itk": b'{"format": "\\n", "epochs": 0, "fingerprint": ""}'},
            r"format '\\n' of the scores file",
        ),
        (
            ["record"],
            {b"itk": b'{"format": 1, "epochs": -1, "fingerprint": ""}'},
            "epochs is -1, and there are 1 columns",
        ),
        (["record"], {b"itk": b'{"format": 1, "epochs": 1e30, "fingerprint": ""}'}, "epochs is 1e.30"),
        (["record"], {b"itk": b'{"format": 1, "epochs": 999999999999999, "fingerprint": ""}'}, "epochs is 9{15}"),
    ],
)
def test_files_that_are_no_scores(tmp_path, names, meta, message):
    _write(tmp_path / "s.parquet", names, meta)
    with pytest.raises(ValueError, match=message) as error:
        read_scores(tmp_path / "s.parquet")
    assert "\n" not in str(error.value)
    assert "s.parquet" in str(error.value)


def test_files_that_are_no_parquet(tmp_path, path):
    with pytest.raises(ValueError, match="no such scores file"):
        read_scores(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ValueError, match="text.parquet: not a Parquet file"):
        read_scores(tmp_path / "text.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a Parquet file"):
        read_meta(path)


def test_damage_anywhere_is_told_and_never_read_as_losses(path, arrays):
    whole = path.read_bytes()
    for place in range(4, len(whole) - 8):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            read = read_scores(path)
        except ValueError as error:
            one_line(error, "scores.parquet")
        else:
            np.testing.assert_array_equal(read.losses, arrays[2])


def test_empty_values(tmp_path):
    table = pa.table({"record": [0, None], "tokens": [1, 1], "loss_0": pa.array([None, 1.0])})
    pq.write_table(table.replace_schema_metadata(NOTED), tmp_path / "s.parquet")
    with pytest.raises(ValueError, match="column record holds an empty value"):
        read_scores(tmp_path / "s.parquet")
    table = table.set_column(0, "record", pa.array([0, 1]))
    pq.write_table(table.replace_schema_metadata(NOTED), tmp_path / "s.parquet")
    np.testing.assert_array_equal(read_scores(tmp_path / "s.parquet").losses, [[np.nan, 1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"record": [0, 2, 1]}, "record numbers must ascend, found 1 after 2"),
        ({"record": [0, 1, 1]}, "found 1 after 1"),
        ({"tokens": [1, 1]}, r"record \(3,\), tokens \(2,\), losses \(2, 3\)"),
        ({"losses": np.zeros(3)}, "losses \\[epochs"),
        ({"meta": {}}, "fingerprint"),
    ],
)
def test_what_is_not_written(tmp_path, change, message):
    call = {"record": [0, 1, 2], "tokens": [1, 1, 1], "losses": np.zeros((2, 3)), "meta": META, **change}
    with pytest.raises(ValueError, match=message):
        write_scores(tmp_path / "s.parquet", **call)
    assert list(tmp_path.iterdir()) == []
