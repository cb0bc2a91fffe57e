"""Print a result file as the Markdown tables of README.md.

    python benchmarks/tables.py benchmarks/results/DATE-DEVICE-cpu.jsonl
    python benchmarks/tables.py benchmarks/results/DATE-DEVICE-cpu.jsonl --before OLDER.jsonl   # what changed since

README.md holds this output word for word between its markers; a test compares them.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pictures import read
from providers import Provider, named

Row = dict[str, Any]
KERNELS = {
    "linear_kl": "KL from hidden states and heads",
    "linear_ce": "Cross-entropy from hidden states and a head",
    "kl_logits": "KL on logits",
    "attention_kl": "Attention KL",
}
SIZES = ("model", "batch", "accumulate", "length")  # the same in all whole runs of a file
NAMELESS = ("kept", "beta")
DEFAULTS = {"share": 1.0, "kind": "forward", "temperature": 1.0, "window": None, "documents": 1}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table under its title, where it has rows."""
    if rows:
        yield from (f"#### {title}", "", *table(head, rows))


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits; nothing where nothing was measured."""
    if value is None:
        return ""
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return text + unit


def shape_name(shape: Row) -> str:
    parts = [f"{k} {v}" for k, v in shape.items() if k not in NAMELESS and v != DEFAULTS.get(k, v is None)]
    return ", ".join(parts)


def missing(rows: list[Row]) -> Iterator[str]:
    """Who has no number, and why; once each."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok" and named(row["provider"]).role != "nobody":
            names = reasons.setdefault(f"{row['status']}: {row.get('reason', '')}", [])
            names += [row["provider"]] if row["provider"] not in names else []
    for reason, names in reasons.items():
        yield f"{', '.join(names)}: {reason}."
    if reasons:
        yield ""


def accuracy(rows: list[Row]) -> Iterator[str]:
    for subject, title in (("accuracy linear_kl", "hidden states and heads"), ("accuracy attention_kl", "maps")):
        own = [r for r in rows if r["subject"] == subject and r["status"] == "ok"]
        providers = list(dict.fromkeys(r["provider"] for r in own))
        by_kl: dict[float, dict[str, float]] = {}
        for row in own:
            by_kl.setdefault(row["kl"], {})[row["provider"]] = row["gradient_error"]
        lines = [[f"{kl:.2g}", *(f"{errors[p]:.2g}" if p in errors else "" for p in providers)]
                 for kl, errors in by_kl.items()]  # fmt: skip
        yield from section(f"Relative gradient error, bf16 {title}", ["KL per row (nats)", *providers], lines)


def kernel(rows: list[Row], subject: str) -> Iterator[str]:
    own = [r for r in rows if r["subject"] == subject]
    shapes: dict[str, dict[str, dict[str, Row]]] = {}  # shape -> provider -> mode
    for row in own:
        if row["status"] == "ok" and named(row["provider"]).role == "rival":
            providers = shapes.setdefault(shape_name(row["shape"]), {})
            providers.setdefault(row["provider"], {})[row["mode"]] = row
    head = ["shape", "by", "forward + backward, ms", "floor / time", "forward, ms", "eval, ms", "MiB", "gradient error"]
    lines = []
    for shape, providers in shapes.items():
        for place, (provider, found) in enumerate(providers.items()):
            both = found.get("forward+backward", {})
            times = [found.get(mode, {}).get("ms") for mode in ("forward", "eval")]
            spread = f" ({number(both['ms_p20'])} to {number(both['ms_p80'])})" if both else ""
            lines.append(
                ["" if place else shape, provider, number(both.get("ms")) + spread,
                 number(both.get("percent_of_floor"), " %"), *map(number, times), number(both.get("memory_mib")),
                 f"{both['gradient_error']:.0e}" if both else ""]
            )  # fmt: skip
    yield from section(KERNELS[subject], head, lines)
    yield from missing(own) if lines else ()


def steps(rows: list[Row]) -> Iterator[str]:
    own = [r for r in rows if r["subject"] == "training_step" and r["status"] == "ok"]
    lines = [
        [r["shape"]["method"], r["provider"], f"{number(r['ms'])} ({number(r['ms_p20'])} to {number(r['ms_p80'])})",
         number(r["tokens_per_s"]), number(r["memory_mib"]),
         number(100 * r["share_beyond_models"], " %") if "share_beyond_models" in r else ""]
        for r in own
    ]  # fmt: skip
    yield from section("Training steps", ["method", "by", "ms", "tokens / s", "MiB", "beyond the models"], lines)


def loops(rows: list[Row]) -> Iterator[str]:
    own = [r for r in rows if r["subject"] == "whole_step"]
    done = [r for r in own if r["status"] == "ok"]
    lines = [
        [r["shape"]["method"], r["shape"]["precision"], r["provider"],
         f"{number(r['ms'])} ({number(r['ms_p20'])} to {number(r['ms_p80'])})", number(r["wall_ms"]),
         number(r["tokens_per_s"]), number(r["memory_mib"]), number(r["start_s"]),
         number(100 * r["fill"], " %"), f"{r['gradient_error']:.0e}"]
        for r in done
    ]  # fmt: skip
    head = ["method", "precision", "by", "step, ms", "wall, ms", "tokens / s", "peak MiB", "s until the first step",
            "full", "gradient error"]  # fmt: skip
    for name in dict.fromkeys(shape_name({k: v for k, v in r["shape"].items() if k in SIZES}) for r in done):
        yield from section(f"Whole runs: {name}", head, lines)
    yield from missing(own)


def limits(rows: list[Row]) -> Iterator[str]:
    own = [r for r in rows if r["subject"] == "limits"]
    lines = [
        [f"{r['shape']['subject']}, {r['shape']['unit']}", r["provider"], f"{r['largest']:,}",
         number(r["memory_mib"]), r["stopped"]]
        for r in own if r["status"] == "ok"
    ]  # fmt: skip
    head = ["subject", "by", "largest that fitted", "MiB there", "stopped because"]
    yield from section("How far it goes", head, lines)


def data_path(rows: list[Row]) -> Iterator[str]:
    own = [r for r in rows if r["subject"] == "data_path" and r["status"] == "ok"]
    lines = [
        [r["mode"], r["provider"], number(r["ms"]), f"{number(r['rate'])} {r['unit']}",
         number(100 * r["fill"], " %") if "fill" in r else ""]
        for r in own
    ]  # fmt: skip
    yield from section("Data path", ["step", "by", "ms", "rate", "full"], lines)


def markdown(path: Path) -> str:
    rows = read(path)
    first = rows[0]
    commits = " and ".join(dict.fromkeys(row["commit"] for row in rows))
    peers = ", ".join(f"{name} {version}" for name, version in first["peers"].items() if version)
    where = [first["device"], f"{first['threads']} thread(s) of {first['cores']} cores"] * (first["kind"] == "cpu")
    lines = [
        f"`{path.name}`: {', '.join(where or [first['device']])}, torch {first['torch']}, triton {first['triton']}, "
        f"Python {first['python']}, {peers}; {first['date'][:10]}, commit {commits}, "
        f"load at the start {first['load_at_start']}; times by {first['clock']}.",
        "",
        *accuracy(rows),
    ]
    for subject in KERNELS:
        lines += kernel(rows, subject)
    lines += [*steps(rows), *loops(rows), *limits(rows), *data_path(rows)]
    return "\n".join(lines).strip() + "\n"


def changes(before: Path, after: Path) -> str:
    """Forward + backward of what both files have, side by side."""

    def measured(path: Path) -> dict[tuple[str, str, Provider], Row]:
        rows = [(r, named(r["provider"])) for r in read(path) if r["status"] == "ok"]
        rows = [(r, who) for r, who in rows if r.get("mode") == "forward+backward" and who.role == "rival"]
        return {(r["subject"], shape_name(r["shape"]), who): r for r, who in rows}

    old, new = measured(before), measured(after)
    pairs = [(*key[:2], old[key], new[key]) for key in old if key in new]
    lines = [
        [subject, shape, b["provider"], *map(number, (b["ms"], a["ms"], b["memory_mib"], a["memory_mib"]))]
        for subject, shape, b, a in pairs
    ]
    head = ["subject", "shape", "by", "before, ms", "after, ms", "before, MiB", "after, MiB"]
    return "\n".join(table(head, lines)).strip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--before", type=Path, help="an older file: print what changed instead")
    options = parser.parse_args()
    print(changes(options.before, options.results) if options.before else markdown(options.results), end="")


if __name__ == "__main__":
    main()
