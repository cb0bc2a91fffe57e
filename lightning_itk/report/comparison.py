"""A picture of arms compared with the first one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_itk.report.pictures import CHOSEN, figure, save


def draw_comparison(path: str | Path, rows: Sequence[Any], columns: int = 3) -> Path:
    """Draw each figure's paired differences from the first arm, with their intervals; a panel for each figure.

    Args:
        path: the PNG to write.
        rows: `evaluation.comparison.Row`s with a difference or None for the first arm.
        columns: panels beside each other; further figures are left out of the picture.
    """
    figures = list(dict.fromkeys(row.figure for row in rows))[:columns]
    arms = list(dict.fromkeys(row.arm for row in rows if row.difference is not None))
    made = figure(1.6 + 3.4 * len(figures), 1.2 + 0.4 * len(arms), len(figures))
    for axes, name in zip(made.axes, figures, strict=True):
        found = {row.arm: row.difference for row in rows if row.figure == name and row.difference is not None}
        for place, arm in enumerate(arms):
            if arm in found:
                gap = found[arm]
                axes.plot([gap.low, gap.high], [place, place], color=CHOSEN, linewidth=2)
                axes.plot([gap.value], [place], "o", color=CHOSEN)
        axes.axvline(0, color="black", linewidth=1, linestyle="--")
        axes.locator_params(axis="x", nbins=5)
        axes.set(
            yticks=range(len(arms)), ylim=(len(arms) - 0.5, -0.5), title=name, xlabel=f"difference from {rows[0].arm}"
        )
        axes.set_yticklabels(arms if axes is made.axes[0] else [])
    return save(made, path)
