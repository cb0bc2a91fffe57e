"""Write the tables of README.md from `results/`: what was measured, with intervals, between the marks."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from arms import ARMS, SOURCES

from lightning_itk.evaluation.comparison import Row, compare
from lightning_itk.evaluation.record_results import read_results
from lightning_itk.report.pictures import markdown_table

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables of results/ -->", "<!-- end -->"
FIGURES = {"response_loss": "response loss", "kl": "KL to the teacher", "teacher_agreement": "agreement"}
SHOP = {"response_loss": "response loss in the shop", "exact_match": "exact match in the shop"}


def tables(results: Path) -> str:
    """Markdown: a table per question, each arm beside the question's first one."""
    designs = {arm.key: arm.design for arm in ARMS}
    lines = [line for path in sorted(results.glob("*.jsonl")) for line in path.read_text().splitlines()]
    rows = [row for row in map(json.loads, lines) if designs.get(row["arm"]) == row["design"]]
    parts = []
    for question in dict.fromkeys(arm.question for arm in ARMS):
        found = {arm.key: [row for row in rows if row["arm"] == arm.key] for arm in ARMS if arm.question == question}
        found = {key: sorted(seeds, key=lambda row: row["seed"]) for key, seeds in found.items() if seeds}
        # A seed that only some arms have had would make its order of records part of their differences.
        shared = set.intersection(*({row["seed"] for row in seeds} for seeds in found.values())) if found else set()
        found = {k: [row for row in seeds if row["seed"] in shared or not shared] for k, seeds in found.items()}
        parts.append(f"### {question}\n\n" + (_table(found, results) if found else "Not run yet.\n"))
        if question == "car" and (results / "car.json").exists():
            parts.append(_ranking(results / "car.json"))
    return "\n".join(parts)


def _table(found: dict[str, list[dict[str, Any]]], results: Path) -> str:
    compared = _compared(found, results / "records", "records", FIGURES)
    if all("shop_records" in row for seeds in found.values() for row in seeds):
        for key, rows in _compared(found, results / "records", "shop_records", SHOP).items():
            compared[key] |= rows
    names = list(next(iter(compared.values())))
    body = []
    for key, seeds in found.items():
        cells: list[object] = [key.partition("/")[2], ", ".join(str(row["seed"]) for row in seeds)]
        for name in names:
            row = compared[key][name]
            cells.append(f"{row.value.value:.3f}")
            gap = row.difference
            cells.append("" if gap is None else f"{gap.value:+.3f} ({gap.low:+.3f} … {gap.high:+.3f})")
        cells.append(f"{sum(row['choice'] for row in seeds) / len(seeds):.2f}")
        cells.append(f"{sum(row['steps'] for row in seeds) / len(seeds):.0f}")
        cells.append(f"{sum(row['response_tokens'] for row in seeds) / len(seeds):,.0f}")
        cells.append(f"{sum(row['seconds'] for row in seeds) / len(seeds) / 60:.1f}")
        body.append(cells)
    head = ["arm", "seeds"]
    for name in names:
        head += [name, f"from {next(iter(found)).partition('/')[2]}"]
    return markdown_table([*head, "choice", "steps", "response tokens", "minutes"], body)


def _ranking(path: Path) -> str:
    """What `choose-teacher` said of the sources, before any student learned from them."""
    ranked = json.loads(path.read_text())["teachers"]
    body: list[list[object]] = []
    for row in ranked:
        low, high = row["interval"]
        cells = [f"{row['car']:.3f} ({low:.3f} … {high:.3f})", *(f"{row[key]:.3f}" for key in ("reward", "loss"))]
        rsr = "" if row["rsr"] is None else f"{row['rsr']:.2f}"
        body.append([SOURCES[row["teacher"]], *cells, rsr, f"{row['length']:.0f}"])
    return markdown_table(["source", "CAR", "reward", "student's loss", "RSR (lower is better)", "tokens"], body)


def _compared(
    found: dict[str, list[dict[str, Any]]], folder: Path, which: str, figures: dict[str, str]
) -> dict[str, dict[str, Row]]:
    """By arm and by a figure's name in words."""
    columns = {key: [read_results(folder / row[which])[0] for row in seeds] for key, seeds in found.items()}
    compared: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in compare(columns, figures=list(figures)):
        compared[row.arm][figures[row.figure]] = row
    return compared


def write(readme: Path, results: Path) -> None:
    """Replace what stands between the marks of a README."""
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{tables(results)}{END}{after}")


if __name__ == "__main__":
    write(HERE / "README.md", HERE / "results")
