"""`compare`: arms of an experiment, record by record."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_itk.evaluation.comparison import Columns, Estimate, Row, compare
from lightning_itk.evaluation.record_results import read_results
from lightning_itk.files import atomic_write
from lightning_itk.outputs import check_output, note_output


def compare_runs(
    runs: list[str],
    figures: list[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    output: str | None = None,
    picture: str | None = None,
    overwrite: bool = False,
) -> None:
    """Compare runs on the same held-out records, from the files of RecordResults; the first one is the baseline.

    Each figure is a mean over response tokens (exact_match: over records), with a 95 % bootstrap interval over records;
    differences from the baseline are paired. Runs of one name are seeds of one arm: their spread is their standard
    deviation. An interval over records says nothing about other seeds.

    Args:
        runs: Results files, as FILE or NAME=FILE; `compare A.parquet kd=B1.parquet kd=B2.parquet` works too.
        figures: Which, e.g. response_loss; null = all that every file has.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
        output: JSON file for the table; null = none.
        picture: PNG file of the differences; null = none.
        overwrite: Replace what an earlier run wrote, if it is unchanged; nothing else is ever replaced.
    """
    arms: dict[str, list[Columns]] = defaultdict(list)
    data = {}
    for path in (output, picture):
        if path is not None:
            check_output(path, overwrite)
    for run in runs:
        name, _, path = run.rpartition("=")
        columns, meta = read_results(path)
        arms[name or path].append(columns)
        data[run] = meta.get("data")
    if len(runs) < 2:
        raise ValueError("compare needs at least two files")
    if len(set(data.values())) > 1:
        raise ValueError("the files hold results of different data: " + ", ".join(data))
    rows = compare(arms, resamples=resamples, seed=seed, figures=figures or ())
    Console().print(*comparison_tables(rows), sep="\n")
    if output is not None:
        with atomic_write(output) as file:
            file.write(json.dumps([_plain(row) for row in rows], indent=2).encode() + b"\n")
        note_output(output)
    if picture is not None:
        from lightning_itk.report.comparison import draw_comparison

        draw_comparison(picture, rows)
        note_output(picture)


def comparison_tables(rows: Sequence[Row]) -> list[Table]:
    """A table per figure, with a row per arm."""
    tables = []
    for figure, group in groupby(rows, key=lambda row: row.figure):
        found = list(group)
        table = Table(title=f"{figure}, {found[0].records:,} records", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("arm", overflow="fold")
        for head in ("seeds", "mean", "95 %", f"from {found[0].arm}", "95 %"):
            table.add_column(head, justify="right", no_wrap=not head.startswith("from"))
        for row in found:
            gap = ("", "") if row.difference is None else _shown(row.difference, "+")
            table.add_row(row.arm, str(row.seeds), *_shown(row.value), *gap)
        tables.append(table)
    return tables


def _shown(estimate: Estimate, sign: str = "") -> tuple[str, str]:
    spread = "" if math.isnan(estimate.spread) else f" ± {estimate.spread:.3f}"
    return f"{estimate.value:{sign}.4f}{spread}", f"{estimate.low:{sign}.3f} … {estimate.high:{sign}.3f}"


def _plain(row: Row) -> dict[str, object]:
    def numbers(estimate: Estimate) -> dict[str, float | None]:
        return {name: None if np.isnan(value) else value for name, value in estimate._asdict().items()}

    found = {"value": numbers(row.value), "difference": None if row.difference is None else numbers(row.difference)}
    return {**row._asdict(), **found}
