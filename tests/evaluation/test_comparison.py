"""Paired differences of arms: against a plain bootstrap, with seeds, and what is refused."""

import json

import numpy as np
import pytest
from commands import refused

from lightning_itk import cli
from lightning_itk.evaluation.comparison import compare
from lightning_itk.evaluation.record_results import write_results

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, 50, 40)
RECORD = np.arange(40)


def columns(shift=0.0, seed=0, **more):
    noise = np.random.default_rng(seed).normal(0, 0.1, 40)
    loss = 2 + np.sin(RECORD) + shift + noise
    return {"record": RECORD, "tokens": TOKENS, "response_loss": loss, **more}


def test_intervals_are_those_of_a_plain_paired_bootstrap():
    a, b = columns(), columns(0.3, seed=1)
    base, other = compare({"a": [a], "b": [b]}, resamples=4000)
    assert base.difference is None
    share = TOKENS / TOKENS.sum()
    assert base.value.value == pytest.approx(a["response_loss"] @ share)
    assert other.difference.value == pytest.approx((b["response_loss"] - a["response_loss"]) @ share)
    found = []
    for _ in range(4000):
        rows = RNG.integers(0, 40, 40)
        found.append(np.average((b["response_loss"] - a["response_loss"])[rows], weights=TOKENS[rows]))
    low, high = np.percentile(found, [2.5, 97.5])
    assert other.difference.low == pytest.approx(low, abs=0.01)
    assert other.difference.high == pytest.approx(high, abs=0.01)
    wide = other.value.high - other.value.low
    assert other.difference.high - other.difference.low < wide / 2  # pairing takes the records' own spread out


def test_seeds_are_averaged_and_their_spread_is_told():
    arms = {"a": [columns(0, s) for s in range(3)], "b": [columns(0.1 * s, 10 + s) for s in range(3)]}
    _, row = compare(arms)
    share = TOKENS / TOKENS.sum()
    means = [arm["response_loss"] @ share for arm in arms["b"]]
    assert row.seeds == 3
    assert row.value.value == pytest.approx(np.mean(means))
    assert row.value.spread == pytest.approx(np.std(means, ddof=1))
    gaps = [b - a["response_loss"] @ share for a, b in zip(arms["a"], means, strict=True)]
    assert row.difference.spread == pytest.approx(np.std(gaps, ddof=1))


def test_exact_match_counts_records_and_nan_is_left_out():
    match = (RECORD % 4 == 0).astype(float)
    kl = np.where(RECORD < 10, np.nan, 1.0)
    rows = compare({"a": [columns(exact_match=match, kl=kl)], "b": [columns(exact_match=1 - match, kl=2 * kl)]})
    found = {(row.figure, row.arm): row for row in rows}
    assert found["exact_match", "a"].value.value == pytest.approx(0.25)
    assert found["kl", "b"].records == 30
    assert found["kl", "b"].difference.value == pytest.approx(1.0)
    assert found["kl", "b"].difference.low == pytest.approx(1.0)


def test_what_cannot_be_compared():
    other = {**columns(), "record": RECORD + 1}
    with pytest.raises(ValueError, match="other records than a"):
        compare({"a": [columns()], "b": [other]})
    with pytest.raises(ValueError, match="other numbers of tokens than a"):
        compare({"a": [columns()], "b": [{**columns(), "tokens": TOKENS + 1}]})
    with pytest.raises(ValueError, match="no figure 'kl'"):
        compare({"a": [columns(kl=RECORD * 1.0)], "b": [columns()]}, figures=["kl"])


def results(path, shift, data="d"):
    found = columns(shift)
    table = {i: [v * n, n] for i, v, n in zip(RECORD, found["response_loss"], TOKENS, strict=True)}
    write_results(path, {"response_loss": table}, {"data": data})
    return str(path)


def test_the_command(tmp_path, capsys):
    a, b = results(tmp_path / "a.parquet", 0.0), results(tmp_path / "b.parquet", 0.5)
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    more = ["--output", str(out), "--picture", str(picture)]
    assert cli.main(["compare", f"sft={a}", f"kd={b}", f"kd={b}", *more]) == 0
    said = capsys.readouterr().out
    assert "response_loss" in said
    assert "+0.5000" in said
    rows = json.loads(out.read_text())
    assert [row["arm"] for row in rows] == ["sft", "kd"]
    assert rows[1]["difference"]["value"] == pytest.approx(0.5)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["compare", "--runs", json.dumps([a, b])]) == 0
    assert "exists already" in refused(capsys, "compare", a, b, "--output", out)
    assert "at least two" in refused(capsys, "compare", a)
    assert "at least two" in refused(capsys, "compare", "--runs", "[]")
    c = results(tmp_path / "c.parquet", 0.0, data="another")
    assert "different data" in refused(capsys, "compare", a, c)
    assert "no such file" in refused(capsys, "compare", a, tmp_path / "none.parquet")
