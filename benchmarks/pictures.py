"""Draw the results.

    python benchmarks/pictures.py benchmarks/results/DATE-DEVICE-cpu.jsonl
    python benchmarks/pictures.py                                            # all that were drawn before, again

Beside the file: gradient error against KL, time with the floor drawn in and memory per subject, training steps, whole
runs, limits.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from providers import named

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
OTHERS = ("#f0a43a", "#59a14f", "#9467bd", "#8c564b", "#17becf", "#bcbd22")


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _colours(providers: list[str]) -> dict[str, str]:
    others = iter(OTHERS * 9)
    return {name: named(name).colour or next(others) for name in providers}


def _unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def _finished(
    figure: Figure, title: str, rows: list[Row], bottom: float = 0.05, note: str = "", size: int = 10
) -> Figure:
    """With its title, and below it where its rows come from."""
    row = rows[0]
    parts = [row["device"], f"torch {row['torch']}", row["date"][:10], f"commit {row['commit']}"]
    lines = ["  ·  ".join(parts)] + [note] * bool(note)
    if row["kind"] == "cpu":
        busy = f"load {row['load_at_start']} on {row['cores']} cores"
        lines.append(f"processor time of {row['threads']} thread(s), {busy}: compare, do not quote")
    figure.suptitle(title, fontsize=size)
    figure.text(0.01, 0.005, "\n".join(lines), fontsize=7, color="#555555", va="bottom")
    figure.tight_layout(rect=(0, bottom, 1, 1))
    return figure


def accuracy(rows: list[Row]) -> Figure | None:
    """Relative gradient error against the KL at which it was taken, both logarithmic; closer models to the right."""
    panels = [("accuracy linear_kl", "KL from hidden states"), ("accuracy attention_kl", "attention loss")]
    panels = [p for p in panels if any(r["subject"] == p[0] and r["status"] == "ok" for r in rows)]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(6.2 * len(panels), 4.8), squeeze=False, sharey=True)
    for axis, (subject, title) in zip(axes[0], panels, strict=True):
        own = [r for r in rows if r["subject"] == subject and r["status"] == "ok"]
        colours = _colours(_unique(r["provider"] for r in own))
        for number, (name, colour) in enumerate(colours.items()):
            points = sorted((r["kl"], r["gradient_error"]) for r in own if r["provider"] == name)
            width = 2.6 if named(name).ours else 1.3
            style = {
                "marker": "osD^v"[number % 5],
                "markersize": 9 - 1.5 * number,
                "dashes": (8, number),
            }  # some coincide
            axis.plot(*zip(*points, strict=True), linewidth=width, color=colour, label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel="KL per row (nats)", title=title)
        axis.axhline(1, color="black", linewidth=0.6, linestyle=":")
        axis.invert_xaxis()
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, loc="upper left")
    axes[0][0].set_ylabel("relative error of the gradient, against fp64")
    title = "bf16 inputs: what is left of the gradient as the student closes in on its teacher"
    note = "worst of the gradients of one input; at 1 (dotted) the error is as large as the gradient"
    return _finished(figure, title, rows, 0.08, note, size=11)


def _bars(
    axis: Axes,
    rows: list[Row],
    column: str,
    label: str,
    providers: list[str],
    form: str = "{:.3g}",
    colours: dict[str, str] | None = None,
) -> None:
    colours = colours or _colours(providers)
    by_name = {r["provider"]: r for r in rows}
    largest = max([v for r in rows if r["status"] == "ok" and (v := r.get(column)) is not None], default=1.0)
    for place, name in enumerate(providers):
        row = by_name.get(name)
        number = row.get(column) if row is not None and row["status"] == "ok" else None
        if number is None:
            text = "" if row is None else "not measured" if row["status"] == "ok" else row["status"]
            axis.text(0.01 * largest, place, text, va="center", fontsize=7, color="#777777", style="italic")
            continue
        axis.barh(place, number, color=colours[name], height=0.7)
        axis.text(number, place, " " + form.format(number), va="center", fontsize=7)
    axis.set_xlim(0, 1.25 * largest)
    axis.set_yticks(range(len(providers)), providers, fontsize=7)
    axis.set_ylim(len(providers) - 0.5, -0.5)
    axis.set_xlabel(label, fontsize=7)
    axis.tick_params(axis="x", labelsize=7)


def _title(shape: dict[str, Any]) -> str:
    hidden = {"beta", "temperature", "kept"}
    parts = [f"{k} {v}" for k, v in shape.items() if k not in hidden and v not in (None, 1.0)]
    return "\n".join(" · ".join(parts[i : i + 3]) for i in range(0, len(parts), 3))


def kernels(rows: list[Row], subject: str) -> Figure | None:
    """Forward + backward of every shape: time (the floor as a line) above, incremental memory below."""
    own = [r for r in rows if r["subject"] == subject and named(r["provider"]).role == "rival"]
    own = [r for r in own if r["mode"] in ("forward+backward", "*")]
    shapes = _unique(json.dumps(r["shape"]) for r in own if r["status"] == "ok")[:5]
    if not shapes:
        return None
    providers = _unique(r["provider"] for r in own)
    height = 0.27 * len(providers) + 1.3
    figure, axes = plt.subplots(
        2, len(shapes), figsize=(3.2 * len(shapes) + 1.6, 2 * height), squeeze=False, sharey=True
    )
    for column, shape in enumerate(shapes):
        here = [r for r in own if json.dumps(r["shape"]) == shape]
        time_axis, memory_axis = axes[0][column], axes[1][column]
        _bars(time_axis, here, "ms", "ms, dashed: floor", providers)
        floors = [r["floor_ms"] for r in here if r.get("floor_ms") is not None]
        if floors:
            time_axis.axvline(floors[0], color="black", linewidth=1, linestyle="--")
        time_axis.set_title(_title(json.loads(shape)), fontsize=7)
        _bars(memory_axis, here, "memory_mib", "MiB beyond the inputs", providers)
    return _finished(figure, f"{subject}: forward + backward", own)


def steps(rows: list[Row], subject: str) -> Figure | None:
    """Tokens per second and, below, peak memory of every method, each with those who take part in it."""
    own = [r for r in rows if r["subject"] == subject and named(r["provider"]).role != "nobody"]
    own.sort(key=lambda row: row["status"] != "ok")
    if not own:
        return None
    alone, memory = subject == "training_step", "MiB beyond weights and optimizer"
    title = "one training step" if alone else f"whole runs: {own[0]['shape']['model']}"
    if not alone:
        memory = "MiB, the allocator's peak" if own[0]["kind"] == "cuda" else "MiB, peak of the process"
    methods: dict[str, list[Row]] = {}
    for row in own:
        shape = row["shape"]
        methods.setdefault(shape["method"] if alone else f"{shape['method']}, {shape['precision']}", []).append(row)
    wide = min(len(methods), 4)
    deep = -(-len(methods) // wide)
    most = max(len(here) for here in methods.values())
    size = (4.2 * wide, deep * 2 * (0.24 * most + 0.7) + 0.8)
    figure, axes = plt.subplots(2 * deep, wide, figsize=size, squeeze=False)
    colours = _colours(_unique(r["provider"] for r in own))
    places = [(axes[2 * (i // wide)][i % wide], axes[2 * (i // wide) + 1][i % wide]) for i in range(deep * wide)]
    for (above, below), name in itertools.zip_longest(places, methods):
        if name is None:
            above.remove()
            below.remove()
            continue
        here = methods[name]
        providers = _unique(r["provider"] for r in here)
        _bars(above, here, "tokens_per_s", "tokens / s", providers, "{:,.0f}", colours)
        _bars(below, here, "memory_mib", memory, providers, "{:,.3g}" if alone else "{:,.0f}", colours)
        above.set_title(name, fontsize=9)
        above.set_ylim(most - 0.5, -0.5)  # bars of one height
        below.set_ylim(most - 0.5, -0.5)
    return _finished(figure, title, own)


def limits(rows: list[Row]) -> Figure | None:
    """The largest size that fitted, on a logarithmic axis."""
    own = [r for r in rows if r["subject"] == "limits" and r["status"] == "ok" and r.get("largest")]
    subjects = _unique(r["shape"]["subject"] for r in own)
    if not subjects:
        return None
    figure, axes = plt.subplots(1, len(subjects), figsize=(5.6 * len(subjects), 2.8), squeeze=False)
    for axis, subject in zip(axes[0], subjects, strict=True):
        here = [r for r in own if r["shape"]["subject"] == subject]
        colours = _colours([r["provider"] for r in here])
        for place, row in enumerate(here):
            axis.barh(place, row["largest"], color=colours[row["provider"]], height=0.7)
            axis.text(
                row["largest"], place, f" {row['largest']:,}, until {row['stopped']}"[:60], va="center", fontsize=7
            )
        axis.set_yticks(range(len(here)), [r["provider"] for r in here], fontsize=7)
        axis.set_xscale("log", base=2)
        axis.set_xlim(min(r["largest"] for r in here) / 2, max(r["largest"] for r in here) * 64)
        axis.set(title=f"{subject}: {here[0]['shape']['unit']}")
        axis.invert_yaxis()
    return _finished(figure, "how far it goes", own, 0.1)


def draw(path: Path, output: Path | None = None) -> list[Path]:
    """All pictures that the results allow, as PNG files named after the result file."""
    rows, drawn = read(path), []
    figures = {"accuracy": accuracy(rows), "limits": limits(rows)}
    figures |= {subject: steps(rows, subject) for subject in ("training_step", "whole_step")}
    figures |= {subject: kernels(rows, subject) for subject in ("linear_kl", "linear_ce", "kl_logits", "attention_kl")}
    for name, figure in figures.items():
        if figure is not None:
            target = (output or path.parent) / f"{path.stem}-{name}.png"
            figure.savefig(target, dpi=140)
            plt.close(figure)
            drawn.append(target)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*", help="default: those in results/ that have pictures already")
    parser.add_argument("--output", type=Path, help="folder of the pictures; default: beside the results")
    options = parser.parse_args()
    drawn = [path for path in sorted(RESULTS.glob("*.jsonl")) if any(RESULTS.glob(f"{path.stem}-*.png"))]
    for path in options.results or drawn:
        for picture in draw(path, options.output):
            print(picture)


if __name__ == "__main__":
    main()
