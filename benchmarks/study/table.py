"""Write the tables of README.md from `results/`: what was measured, with intervals, between the marks."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from arms import ARMS

from lightning_itk.evaluation.comparison import Row, compare
from lightning_itk.evaluation.record_results import read_results
from lightning_itk.report.pictures import markdown_table

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables of results/ -->", "<!-- end -->"
FIGURES = {"response_loss": "response loss", "kl": "KL to the teacher", "teacher_agreement": "agreement"}


def tables(results: Path) -> str:
    """Markdown: a table per question, each arm beside the question's first one."""
    designs = {arm.key: arm.design for arm in ARMS}
    lines = [line for path in sorted(results.glob("*.jsonl")) for line in path.read_text().splitlines()]
    rows = [row for row in map(json.loads, lines) if designs.get(row["arm"]) == row["design"]]
    parts = []
    for question in dict.fromkeys(arm.question for arm in ARMS):
        found = {arm.key: [row for row in rows if row["arm"] == arm.key] for arm in ARMS if arm.question == question}
        found = {key: sorted(seeds, key=lambda row: row["seed"]) for key, seeds in found.items() if seeds}
        parts.append(f"### {question}\n\n" + (_table(found, results) if found else "Not run yet.\n"))
    return "\n".join(parts)


def _table(found: dict[str, list[dict[str, Any]]], results: Path) -> str:
    columns = {
        key: [read_results(results / "records" / row["records"])[0] for row in seeds] for key, seeds in found.items()
    }
    compared: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in compare(columns, figures=list(FIGURES)):
        compared[row.arm][row.figure] = row
    body = []
    for key, seeds in found.items():
        cells: list[object] = [key.partition("/")[2], ", ".join(str(row["seed"]) for row in seeds)]
        for figure in FIGURES:
            row = compared[key][figure]
            cells.append(f"{row.value.value:.3f}")
            gap = row.difference
            cells.append("" if gap is None else f"{gap.value:+.3f} ({gap.low:+.3f} … {gap.high:+.3f})")
        cells.append(f"{sum(row['choice'] for row in seeds) / len(seeds):.2f}")
        cells.append(f"{sum(row['response_tokens'] for row in seeds) / len(seeds):,.0f}")
        cells.append(f"{sum(row['seconds'] for row in seeds) / len(seeds) / 60:.1f}")
        body.append(cells)
    head = ["arm", "seeds"]
    for name in FIGURES.values():
        head += [name, f"from {next(iter(found)).partition('/')[2]}"]
    return markdown_table([*head, "choice", "response tokens", "minutes"], body)


def write(readme: Path, results: Path) -> None:
    """Replace what stands between the marks of a README."""
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{tables(results)}{END}{after}")


if __name__ == "__main__":
    write(HERE / "README.md", HERE / "results")
