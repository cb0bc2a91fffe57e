"""The pictures of a selection: they are drawn, complete PNG files, and refuse what cannot be drawn."""

import sys

import numpy as np
import pytest

from lightning_itk.report import draw_selection, markdown_table
from lightning_itk.selection import select


def numbers():
    random = np.random.default_rng(0)
    scores = random.normal(size=800)
    scores[::9] = np.nan
    return scores, random.integers(1, 300, 800), random


@pytest.mark.parametrize("kinds", [None, 4, 100])
@pytest.mark.parametrize("order", ["lowest", "middle"])
def test_pictures(tmp_path, kinds, order):
    image = pytest.importorskip("matplotlib.image")
    scores, tokens, random = numbers()
    groups = None if kinds is None else random.integers(0, kinds, 800)
    chosen = select(scores, 0.1, order=order)
    path = draw_selection(tmp_path / "new" / "a.png", scores, tokens, chosen, metric="LP(1)", groups=groups)
    assert image.imread(path).std() > 0
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_nothing_and_everything(tmp_path, fraction):
    pytest.importorskip("matplotlib")
    scores, tokens, _ = numbers()
    chosen = select(scores, 1.0) if fraction else np.empty(0, np.int64)
    draw_selection(tmp_path / "a.png", scores, tokens, chosen)
    draw_selection(tmp_path / "a.png", np.ones(800), tokens, chosen)


def test_refusals(tmp_path):
    pytest.importorskip("matplotlib")
    scores, tokens, _ = numbers()
    with pytest.raises(ValueError, match="no sample has a score"):
        draw_selection(tmp_path / "a.png", np.full(3, np.nan), [1, 1, 1], [])
    with pytest.raises(ValueError, match=r"tokens must have one entry per sample: found \(799,\), expected \(800,\)"):
        draw_selection(tmp_path / "a.png", scores, tokens[1:], [])
    with pytest.raises(ValueError, match="groups must have one entry"):
        draw_selection(tmp_path / "a.png", scores, tokens, [], groups=["a"])
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    scores, tokens, _ = numbers()
    with pytest.raises(ImportError, match=r"pip install 'lightning-itk\[report\]'"):
        draw_selection(tmp_path / "a.png", scores, tokens, [0])


def test_markdown_table():
    assert markdown_table(["a", "b"], [["x", 1]]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n"
