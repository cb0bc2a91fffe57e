"""Tables and pictures hold what the rows say, and depend on no name; the report holds the tables."""

import json
import re
import sys
from pathlib import Path

import pictures
import providers
import run
import tables
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SUBJECTS = list(run.SUBJECTS)


def test_pictures_are_drawn(results, tmp_path):
    path = tmp_path / "all.jsonl"
    subjects = ("accuracy", "attention_kl", "training_step", "whole_step", "limits")
    path.write_text("".join(results(subject).read_text() for subject in subjects))
    drawn = {picture.stem.removeprefix("all-") for picture in pictures.draw(path)}
    assert drawn == set(subjects)


def test_without_a_file_what_was_drawn_is_drawn_again(results, tmp_path, monkeypatch):
    for name in ("drawn", "other"):
        (tmp_path / f"{name}.jsonl").write_text(results("limits").read_text())
    (tmp_path / "drawn-limits.png").touch()
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["pictures.py"])
    pictures.main()
    assert (tmp_path / "drawn-limits.png").stat().st_size > 1000
    assert not (tmp_path / "other-limits.png").exists()


def test_the_report_says_what_the_rows_say():
    report = (BENCHMARKS / "README.md").read_text()
    held = re.findall(r"<!-- tables of (\S+) -->\n(.*?)<!-- end -->", report, flags=re.DOTALL)
    assert held
    for path, text in held:
        assert text == tables.markdown(BENCHMARKS / path)
    held = re.findall(r"<!-- changes since (\S+) in (\S+) -->\n(.*?)<!-- end -->", report, flags=re.DOTALL)
    assert held
    for before, after, text in held:
        assert text == tables.changes(BENCHMARKS / before, BENCHMARKS / after)


def test_tables_hold_every_subject(results, tmp_path):
    path = tmp_path / "all.jsonl"
    path.write_text("".join(results(subject).read_text() for subject in SUBJECTS))
    text = tables.markdown(path)
    assert text.count("#### ") == 2 + len(tables.KERNELS) + 4
    assert "not available: the Triton kernels need a GPU" in text or torch.cuda.is_available()


def test_tables_and_pictures_depend_on_no_name(rename, tmp_path):
    """The rows of the report, and some about nobody, under other names: the same text, bars, lines and colours."""
    rows = pictures.read(BENCHMARKS / "results" / "2026-11-21-amd-epyc-cpu.jsonl")
    for key, subject in [("all", "training_step"), *((k, s) for k in ("all", "reference") for s in tables.KERNELS)]:
        like = next(row for row in rows if row["subject"] == subject)
        shown = providers.PROVIDERS[key].shown
        rows.append({**like, "provider": shown, "mode": "*", "status": "skipped", "reason": "nobody"})
    keys = [providers.named(row["provider"]).key for row in rows]
    assert set(keys) <= set(providers.PROVIDERS)
    for key, row in zip(keys, rows, strict=True):  # some had another name then
        row["provider"] = providers.PROVIDERS[key].name("cpu")

    def figures():
        kernels = [pictures.kernels(rows, subject) for subject in tables.KERNELS]
        for figure in (pictures.accuracy(rows), pictures.steps(rows, "training_step"), pictures.limits(rows), *kernels):
            for axis in figure.axes:
                texts = [*axis.texts, *axis.get_yticklabels(), *(axis.legend_.texts if axis.legend_ else ())]
                yield [text.get_text() for text in texts]
                yield [(bar.get_facecolor(), bar.get_y(), bar.get_width()) for bar in axis.patches]
                yield [(x.get_color(), x.get_linewidth(), x.get_marker(), x.get_xydata().tolist()) for x in axis.lines]
            pictures.plt.close(figure)

    def everything() -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return tables.markdown(path) + tables.changes(path, path) + json.dumps(list(figures()), default=float)

    before = everything()
    back = rename()
    for key, row in zip(keys, rows, strict=True):
        row["provider"] = providers.PROVIDERS[key].shown
    assert back(everything()) == before
    assert "nobody" not in before
