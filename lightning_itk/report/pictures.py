"""Pictures of a selection: what was chosen, and what it favours. Needs the `report` extra (matplotlib)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_itk.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHOSEN, REST = "#c44e52", "#b8bcc4"
_POINTS = 5000  # more dots of one kind only darken a scatter plot


def figure(width: float = 6, height: float = 4, columns: int = 1) -> "Figure":
    """An empty figure with `columns` panels in a row, in inches; it needs no display and no pyplot state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'lightning-itk[report]'") from None
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    for axes in np.ravel(made.subplots(1, columns)):
        axes.spines[["top", "right"]].set_visible(False)
    return made


def save(made: "Figure", path: str | Path) -> Path:
    """Write a figure as PNG, complete or not at all."""
    with atomic_write(path) as file:
        made.savefig(file, dpi=150, format="png")
    return Path(path)


def draw_selection(
    path: str | Path,
    scores: ArrayLike,
    tokens: ArrayLike,
    chosen: ArrayLike,
    *,
    metric: str = "LP",
    groups: ArrayLike | None = None,
    group_kind: str = "cluster",
) -> Path:
    """Draw a selection: the scores with the cut, scores against response length, and the share of each group.

    Args:
        path: the PNG to write.
        scores: what was ranked [samples]; nan = undefined.
        tokens: response tokens [samples].
        chosen: indices of the selected samples.
        metric: the name of the scores.
        groups: cluster or source of each sample [samples]; None = no third panel.
        group_kind: what a group is.

    Returns:
        The path.

    Raises:
        ImportError: the `report` extra is not installed.
        ValueError: nothing to draw, or arrays of unequal length.
    """
    values, lengths = np.asarray(scores, np.float64), np.asarray(tokens)
    defined = ~np.isnan(values)
    picked = np.zeros(len(values), bool)
    picked[np.asarray(chosen, np.int64)] = True
    if not defined.any():
        raise ValueError("no sample has a score, so there is nothing to draw")
    for what, array in (("tokens", lengths), ("groups", values if groups is None else np.asarray(groups))):
        if array.shape != values.shape:
            raise ValueError(f"{what} must have one entry per sample: found {array.shape}, expected {values.shape}")
    made = figure(13 if groups is not None else 9, 3.8, 2 if groups is None else 3)
    _draw_distribution(made.axes[0], values, defined, picked, metric)
    _draw_lengths(made.axes[1], values, lengths, defined, picked, metric)
    if groups is not None:
        _draw_groups(made.axes[2], np.asarray(groups), defined, picked, group_kind)
    made.suptitle(f"{picked.sum():,} of {defined.sum():,} samples selected", x=0.01, ha="left")
    return save(made, path)


def _limits(values: NDArray[Any], defined: NDArray[np.bool_]) -> tuple[float, float]:
    """What to show of a heavy-tailed score: nearly all of it."""
    low, high = np.quantile(values[defined], [0.002, 0.998])
    room = 0.03 * (high - low) or 0.5
    return float(low - room), float(high + room)


def _draw_distribution(axes: Any, values: Any, defined: Any, picked: Any, metric: str) -> None:
    low, high = _limits(values, defined)
    bins = np.linspace(low, high, 60)
    inside = np.clip(values, low, high)
    axes.hist([inside[picked], inside[defined & ~picked]], bins, stacked=True, color=[CHOSEN, REST])
    axes.legend(["selected", "left out"], frameon=False)
    chosen, rest = values[picked], values[defined & ~picked]
    if len(chosen) and len(rest):
        below = chosen.max() <= rest.min()
        if below or chosen.min() >= rest.max():
            cut = chosen.max() if below else chosen.min()
            axes.axvline(cut, color="black", linewidth=1, linestyle="--")
            axes.annotate(f" cut {cut:.3g}", (cut, 0.98), xycoords=("data", "axes fraction"), va="top")
    axes.margins(y=0.15)  # room for the name of the cut
    outside = defined & ((values < low) | (values > high))
    note = f" (the edges hold {outside.sum():,} beyond them)" if outside.any() else ""
    axes.set(xlim=(low, high), xlabel=metric + note, ylabel="samples", title=f"Distribution of {metric}")


def _draw_lengths(axes: Any, values: Any, lengths: Any, defined: Any, picked: Any, metric: str) -> None:
    random = np.random.default_rng(0)
    for mask, colour, label in ((defined & ~picked, REST, "left out"), (picked, CHOSEN, "selected")):
        index = np.flatnonzero(mask)
        shown = index if len(index) <= _POINTS else random.choice(index, _POINTS, replace=False)
        mean = f", mean {lengths[index].mean():.0f} tokens" if len(index) else ""
        axes.scatter(lengths[shown], values[shown], s=5, alpha=0.5, color=colour, linewidths=0, label=label + mean)
    axes.set(
        xscale="log",
        ylim=_limits(values, defined),
        xlabel="response tokens",
        ylabel=metric,
        title="Does it choose by length?",
    )
    legend = axes.legend(loc="upper right", fontsize="small", markerscale=3, framealpha=0.9, edgecolor="none")
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def _draw_groups(axes: Any, groups: Any, defined: Any, picked: Any, kind: str) -> None:
    names, label = np.unique(groups[defined], return_inverse=True)
    total = np.bincount(label)
    share = 100 * np.bincount(label[picked[defined]], minlength=len(names)) / total
    overall = 100 * picked.sum() / defined.sum()
    if len(names) <= 20:
        order = np.argsort(share, kind="stable")
        axes.barh([_short(names[n]) for n in order], share[order], color=CHOSEN)
        axes.axvline(overall, color="black", linewidth=1, linestyle="--")
        axes.set(xlabel=f"selected (%); dashed: overall {overall:.1f} %", title=f"Share of each {kind}")
    else:
        axes.scatter(total, share, s=8, color=CHOSEN, linewidths=0, alpha=0.7)
        axes.axhline(overall, color="black", linewidth=1, linestyle="--")
        axes.set(
            xscale="log",
            ylim=(0, max(share.max() * 1.1, 1)),
            xlabel=f"samples in the {kind}",
            ylabel=f"selected (%); dashed: overall {overall:.1f} %",
            title=f"Share of {len(names):,} {kind}s",
        )


def _short(name: object, width: int = 24) -> str:
    text = str(name)
    return text if len(text) <= width else text[: width - 1] + "…"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [list(head), ["---"] + ["---:"] * (len(head) - 1), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
