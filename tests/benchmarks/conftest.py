"""Tiny runs, made once, and providers under other names."""

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import providers  # noqa: E402
import run  # noqa: E402


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """`results(subject)` -> the file of a tiny run; made once per subject."""
    made: dict[str, Path] = {}

    def make(subject: str) -> Path:
        if subject not in made:
            folder = tmp_path_factory.mktemp(subject)
            made[subject] = run.main(["--tiny", "--only", subject, "--output", str(folder)])
        return made[subject]

    return make


@pytest.fixture
def rename(monkeypatch):
    """`rename()` gives every provider another name; returns what puts the names of a CPU back into a text."""

    def renamed():
        known = dict(providers.PROVIDERS)
        for key, record in known.items():
            other = dataclasses.replace(record, shown=f"<{key}>", shown_on_cpu=None)
            monkeypatch.setitem(providers.PROVIDERS, key, other)

        def back(text: str) -> str:
            for key, record in known.items():
                text = text.replace(f"<{key}>", record.name("cpu"))
            return text

        return back

    return renamed
