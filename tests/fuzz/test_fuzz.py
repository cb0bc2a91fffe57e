"""Some seconds of every kind of fuzzing, always the same cases (`make fuzz` runs others); what is planted is found."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.engine import Figures, Kind, batch, run
from fuzz.kinds import KINDS
from hypothesis import strategies as st

from lightning_itk.attention import kl as attention
from lightning_itk.data import chat, readers, records, sampler, samples, spans
from lightning_itk.losses import operators, token
from lightning_itk.selection import percentage

pytestmark = pytest.mark.fuzz
SEED = 1_000_000
SECONDS = float(os.environ.get("ITK_FUZZ_SECONDS", 10))
COMMAND = import_module("lightning_itk.cli.main")
TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_found(name: str) -> None:
    kind = KINDS[name]
    figures = run(kind, Figures(name, SEED), SECONDS, stop=True)
    print(figures)
    assert not figures.failures, str(figures)
    assert figures.cases >= min(kind.least, 10 * SECONDS), f"too few cases to mean anything: {figures}"
    assert len(figures.outcomes) > 1, f"all cases come to the same: {figures}"


@pytest.mark.interpret
def test_nothing_is_found_in_the_interpreter() -> None:
    options = ["--kinds", "triton", "--minutes", str(SECONDS / 120), "--seed", "1"]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths, "ITK_FUZZ_CASE": ""}
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", *options], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "triton" in done.stdout


def shifted(original: Any) -> Any:
    return lambda *args: tuple(place + 1 for place in original(*args))


def unlike_its_strides(original: Any) -> Any:
    """Labels read as if they lay one after the other."""
    return lambda labels, *rows: original(labels.as_strided(labels.shape, (1,) * labels.ndim), *rows)


def half_a_percent_off(original: Any) -> Any:
    def loss(*args: Any, **options: Any) -> Any:
        total, parts, gradient = original(*args, **options)
        return total, parts, None if gradient is None else gradient * 1.005

    return loss


def without_row_mask(original: Any) -> Any:
    return lambda student, teacher, masks, **how: original(student, teacher, masks._replace(row_mask=None), **how)


def without_every_third(original: Any) -> Any:
    return lambda path: ((number, line) for number, line in original(path) if number % 3)


PLANTED = {
    "labels shifted by one": ("records", chat, "_token_span", shifted),
    "stops that are not learned": ("records", spans.Renderer, "_with_stops", lambda _: lambda *a, **_k: (a[1], a[2])),
    "a swallowed history": ("records", records, "_history", lambda _: lambda *_: []),
    "an error of many lines": ("records", records, "_names", lambda _: "\n".join),
    "lines that are lost": ("files", readers, "_read_lines", without_every_third),
    "samples out of order": (
        "files", samples.TokenizedSource, "__getitem__", lambda get: lambda self, i: get(self, len(self) - 1 - i)
    ),
    "an error nobody expected": ("configs", COMMAND, "_is_users", lambda _: lambda _: False),
    "strides that are not looked at": ("tensors", operators, "kept_rows", unlike_its_strides),
    "a gradient half a percent off": ("tensors", token, "distillation_loss", half_a_percent_off),
    "query rows that should not count": ("tensors", attention, "tiled_attention_kl", without_row_mask),
    "a resumption one batch late": (
        "samplers", sampler.BatchSampler, "batches", lambda old: lambda self, start=0: old(self, start + (start > 0))
    ),
    "a quota one short": ("samplers", percentage, "lowest_by_quota", lambda old: lambda *a, **k: old(*a, **k)[1:]),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_what_is_planted_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, place, attribute, change = PLANTED[bug]
    monkeypatch.setattr(place, attribute, change(getattr(place, attribute)))
    figures = run(KINDS[name], Figures(name, SEED), 60, shrink=False, stop=True)
    assert figures.failures
    assert figures.cases < 500


def test_a_failure_is_shrunk_and_can_be_run_again() -> None:
    seen: list[list[int]] = []

    def case(data: Any) -> str:
        seen.append(data.draw(st.lists(st.integers(0, 1000))))
        assert sum(seen[-1]) < 700, "too much"
        return "little"

    kind = Kind("sums", case)
    figures = run(kind, Figures("sums", 5), 30, stop=True)
    (failure,) = figures.found()
    assert failure.where.endswith("too much")
    assert f"make fuzz CASE=sums:{failure.text}" in str(figures)
    for again in ({"text": failure.text}, {"number": failure.number}):
        seen.clear()
        found = Figures("sums", 5)
        batch(kind, **{"number": 0, "figures": found, **again})
        assert list(found.failures) == list(figures.failures)
        assert sum(seen[-1]) == 700
    assert figures.plain()["failures"][0]["count"] == 1


def test_a_hang_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.engine.CPU_SECONDS", 0.2)

    def case(_: Any) -> str:
        while True:
            torch.ones(9).sum()

    figures = run(Kind("loops", case, batch=1), Figures("loops", 0), 0.1, shrink=False, stop=True)
    assert "more than" in figures.found()[0].report
