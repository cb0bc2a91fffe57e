"""Reproduce what arXiv 2402.10430's published perplexities say about LP(1) and LP_app, and write it down.

    python benchmarks/published_lp.py --data ../shared/data/lp --out docs/published_lp.md

Each Parquet file <dataset>-<model>.parquet holds `perplexity_epoch_0` … `perplexity_epoch_n` of every sample of one
data set, in one order. Needs the extras `report` and `cluster` (matplotlib, SciPy).
"""

import argparse
import os
import shlex
import sys
from dataclasses import dataclass
from itertools import cycle, groupby
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from matplotlib import colormaps
from numpy.typing import NDArray
from scipy.stats import kendalltau, rankdata

from lightning_itk.report import figure, markdown_table, save
from lightning_itk.selection import approximate_learning_percentage, learning_percentage, select

Array = NDArray[np.float64]
BOTTOM = (0.01, 0.03, 0.05, 0.10)


@dataclass(frozen=True)
class Published:
    """The published figures of one model on one data set of n samples."""

    model: str
    losses: Array  # [epochs + 1, n], log perplexity

    @property
    def truncated(self) -> NDArray[np.bool_]:
        """Perplexity exactly 1 before and after every epoch: no response token was left to learn."""
        return (self.losses == 0).all(0)

    @property
    def scored(self) -> Array:
        """The losses as this kit records them: nan for samples without a response."""
        return np.where(self.truncated, np.nan, self.losses)


def read(folder: Path) -> dict[str, list[Published]]:
    """Data set -> its models, small ones first."""
    sets: dict[str, list[Published]] = {}
    for path in sorted(folder.glob("*.parquet")):
        dataset, _, model = path.stem.partition("-")
        table = pq.read_table(path)
        epochs = sum(name.startswith("perplexity_epoch_") for name in table.column_names)
        perplexity = np.stack([table[f"perplexity_epoch_{epoch}"].to_numpy() for epoch in range(epochs)])
        sets.setdefault(dataset, []).append(Published(model, np.log(perplexity)))
    if not sets:
        raise SystemExit(f"{folder}: no Parquet file found")
    for dataset, models in sets.items():
        models.sort(key=lambda published: (published.model.split("-")[0] != "opt", _size(published.model)))
        lengths = {published.model: published.losses.shape[1] for published in models}
        if len(set(lengths.values())) > 1:
            raise SystemExit(f"{dataset}: the models disagree on the number of samples: {lengths}")
    return sets


def _size(model: str) -> float:
    number = model.split("-")[-1]
    return float(number[:-1]) * {"m": 1e6, "b": 1e9}[number[-1]]


def learning_shares(published: Published) -> Array:
    """LP(1), LP(2), … of each sample [epochs, n]: the share of all perplexity drop that falls into each epoch."""
    perplexity = np.exp(published.scored)
    drop = perplexity[0] - perplexity[-1]
    return np.where(drop == 0, np.nan, (perplexity[:-1] - perplexity[1:]) / np.where(drop == 0, 1, drop))


def oddities(published: Published) -> dict[str, float]:
    """Shares of samples that do not learn as the formula expects, and the extremes of LP(1)."""
    before, first, *_, previous, last = published.losses
    lp = learning_percentage(published.scored)
    return {
        "P1 > P0": (first > before).mean(),
        "P3 > P0": (last > before).mean(),
        "both": int(((first > before) & (last > before)).sum()),
        "LP(1) > 1": (lp > 1).mean(),
        "P3 > P2": (last > previous).mean(),
        "lowest": np.nanmin(lp),
        "highest": np.nanmax(lp),
    }


def reference_scores(published: Published, metric: str) -> Array:
    """Scores as the authors' code ranks them: undefined counts as 0, that is as hardest."""
    formula = learning_percentage if metric == "lp" else approximate_learning_percentage
    return np.nan_to_num(formula(published.losses), nan=0.0)


def kit_scores(published: Published, metric: str) -> Array:
    """Scores as this kit ranks them: nan = undefined = left out."""
    return (learning_percentage if metric == "lp" else approximate_learning_percentage)(published.scored)


def truncated_share(published: Published, metric: str, fraction: float) -> float:
    """How much of the lowest `fraction` has nothing to learn, when the truncated samples are kept in the ranking."""
    return float(published.truncated[select(reference_scores(published, metric), fraction)].mean())


def bottom_overlap(first: Array, second: Array, fraction: float) -> float:
    """Share of the lowest `fraction` by the second score that the first one also selects."""
    chosen = select(second, fraction)
    return len(np.intersect1d(select(first, fraction), chosen)) / len(chosen)


def spearman(first: Array, second: Array) -> float:
    """Spearman's rank correlation over the samples that both scores define."""
    both = ~(np.isnan(first) | np.isnan(second))
    return float(np.corrcoef(rankdata(first[both]), rankdata(second[both]))[0, 1])


def kendall(first: Array, second: Array) -> float:
    """Kendall's tau-b over the samples that both scores define."""
    both = ~(np.isnan(first) | np.isnan(second))
    return float(kendalltau(first[both], second[both]).statistic)


def page(dataset: str, models: list[Published]) -> str:
    """The figures of one data set as Markdown."""
    samples = models[0].losses.shape[1]
    targets = [published for published in models if published.model.endswith("13b")] or models[-1:]
    largest = targets[0]
    parts = [f"## {dataset.capitalize()}: {samples:,} samples, {len(models)} models\n"]

    rows = []
    for published in models:
        with_response = np.exp(published.losses[:, ~published.truncated])
        quartiles = np.nanquantile(kit_scores(published, "lp"), [0.25, 0.5, 0.75])
        shares = np.nanmedian(learning_shares(published), axis=1)
        rows.append(
            [
                published.model,
                *(f"{value:,.1f}" for value in (np.median(with_response[0]), with_response[0].mean())),
                f"{with_response[0].max():,.0f}",
                f"{np.median(with_response[-1]):.2f}",
                " / ".join(f"{value:.2f}" for value in quartiles),
                " / ".join(f"{100 * value:.1f} %" for value in shares),
            ]
        )
    parts += [
        "### What is learned, and when\n",
        "Perplexity before training is extremely heavy-tailed, and most of the drop comes in the first epoch. "
        "Truncated samples are left out here.\n",
        markdown_table(
            ["model", "P₀ median", "mean", "max", "P₃ median", "LP(1) quartiles", "median LP(1) / LP(2) / LP(3)"], rows
        ),
        "### Samples that do not follow the formula\n",
        "`both` counts samples that got worse in the first epoch and in the end: their LP(1) looks like an ordinary "
        "positive one.\n",
    ]
    odd = {published.model: oddities(published) for published in models}
    rows = [
        [
            name,
            *(f"{100 * values[key]:.2f} %" for key in ("P1 > P0", "P3 > P0")),
            f"{values['both']:.0f}",
            *(f"{100 * values[key]:.1f} %" for key in ("LP(1) > 1", "P3 > P2")),
            f"{values['lowest']:.1f} … {values['highest']:.1f}",
        ]
        for name, values in odd.items()
    ]
    parts.append(markdown_table(["model", "P₁ > P₀", "P₃ > P₀", "both", "LP(1) > 1", "P₃ > P₂", "LP(1) range"], rows))

    rows = [
        [
            published.model,
            f"{published.truncated.sum()} ({100 * published.truncated.mean():.1f} %)",
            *(f"{100 * truncated_share(published, 'lp', fraction):.0f} %" for fraction in BOTTOM),
            *(f"{100 * truncated_share(published, 'lp_app', fraction):.0f} %" for fraction in BOTTOM),
        ]
        for published in models
    ]
    parts += [
        "### Truncated samples, and where a ranking that keeps them puts them\n",
        "A prompt that fills the whole context leaves no response token: loss 0, P = 1 in every epoch, LP(1) = 0/0 "
        "(taken as 0 by the authors' code) and LP_app = 0. Both mean *hardest*. The share of such samples in the "
        "lowest p of all samples, ranked without clusters (the published subsets take p per cluster, which dilutes "
        "it):\n",
        markdown_table(
            ["model", "truncated", *(f"LP(1) {p:.0%}" for p in BOTTOM), *(f"LP_app {p:.0%}" for p in BOTTOM)],
            rows,
        ),
        "They also make models seem to agree. Overlap of the lowest 1 % by LP(1) with that of "
        f"{largest.model}, with them and without:\n",
        markdown_table(
            ["model", "with", "without"],
            [
                [
                    published.model,
                    f"{bottom_overlap(reference_scores(published, 'lp'), reference_scores(largest, 'lp'), 0.01):.2f}",
                    f"{bottom_overlap(kit_scores(published, 'lp'), kit_scores(largest, 'lp'), 0.01):.2f}",
                ]
                for published in models
                if published is not largest
            ],
        ),
        "This kit drops samples without response tokens before it ranks, and says how many.\n",
        "### Do small models rank like large ones?\n",
        "Rank correlation of each model's scores with a large model's own: Spearman's ρ, and Kendall's τ. *All* keeps "
        "the truncated samples (as score 0); *defined* and τ leave out those of either model.\n",
    ]
    head = ["model"]
    for target in targets:
        head += [f"{target.model}: {name}" for name in ("LP(1) all", "defined", "τ", "LP_app all", "defined", "τ")]
    rows = []
    for published in models:
        row = [published.model]
        for target in targets:
            for metric in ("lp", "lp_app"):
                every = spearman(reference_scores(published, metric), reference_scores(target, metric))
                ours, theirs = kit_scores(published, metric), kit_scores(target, metric)
                row += [f"{value:.3f}" for value in (every, spearman(ours, theirs), kendall(ours, theirs))]
        rows.append(row)
    parts.append(markdown_table(head, rows))
    rows = [
        [
            published.model,
            *(
                f"{spearman(kit_scores(published, metric), kit_scores(target, 'lp')):.3f}"
                for target in targets
                for metric in ("lp", "lp_app")
            ),
            f"{spearman(kit_scores(published, 'lp'), kit_scores(published, 'lp_app')):.3f}",
        ]
        for published in models
    ]
    parts += [
        "Which score of one model best predicts the LP(1) of a large one (Spearman, defined samples)? LP_app costs one "
        "epoch, LP(1) all of them. The last column compares the two scores of one model.\n",
        markdown_table(
            [
                "model",
                *(f"{metric} → LP(1) of {target.model}" for target in targets for metric in ("LP(1)", "LP_app")),
                "its own LP(1) and LP_app",
            ],
            rows,
        ),
    ]
    return "\n".join(parts)


def draw(dataset: str, models: list[Published], path: Path) -> None:
    """LP(1) of each model, and the truncated share of what a ranking that keeps them selects."""
    plot = figure(10, 4, columns=2)
    left, right = plot.axes
    shades = []  # one colour for each family, darker for larger models
    families = groupby(models, key=lambda published: published.model.split("-")[0])
    for tint, (_, family) in zip(cycle(("Blues", "Oranges", "Greens")), families, strict=False):
        shades += [colormaps[tint](shade) for shade in np.linspace(0.35, 0.95, len(list(family)))]
    for published, shade in zip(models, shades, strict=True):
        scores = kit_scores(published, "lp")
        ordered = np.sort(scores[~np.isnan(scores)])
        left.plot(ordered, np.linspace(0, 100, len(ordered)), color=shade, label=published.model)
        order = np.argsort(reference_scores(published, "lp"), kind="stable")
        fractions = np.arange(1, len(order) + 1)
        share = np.cumsum(published.truncated[order]) / fractions
        shown = slice(len(order) // 500, len(order) // 4)
        right.plot(100 * fractions[shown] / len(order), 100 * share[shown], color=shade)
    left.set(
        xlim=(0, 1.1), ylim=(0, 100), xlabel="LP(1)", ylabel="samples below (%)", title="What the first epoch learns"
    )
    left.legend(frameon=False, fontsize="small")
    right.set(
        xlim=(0, 25),
        ylim=(0, 100),
        xlabel="selected: lowest LP(1) (%)",
        ylabel="without a response token (%)",
        title="What a ranking with truncated samples selects",
    )
    plot.suptitle(f"{dataset.capitalize()}: published perplexities of {len(models)} models")
    save(plot, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    folder = Path(os.environ.get("ITK_REAL_DATA", "../shared/data")) / "lp"
    parser.add_argument("--data", type=Path, default=folder, help="folder of <dataset>-<model>.parquet")
    parser.add_argument("--out", type=Path, default=Path("docs/published_lp.md"), help="the Markdown page to write")
    arguments = parser.parse_args()
    command = shlex.join(["python", "benchmarks/published_lp.py", *sys.argv[1:]])
    text = [
        "# The published perplexities, read again\n",
        "The authors of LP (arXiv 2402.10430) published the perplexity of every training response under models of 350M "
        "to 13B parameters, before training and after each of three epochs. These are the figures that "
        "`lightning_itk.selection` makes of them. They are the reason for two defaults of this kit: LP_app, and "
        "dropping samples without response tokens.\n",
        f"Made by\n\n    {command}\n",
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for dataset, models in read(arguments.data).items():
        picture = arguments.out.with_name(f"{arguments.out.stem}_{dataset}.png")
        draw(dataset, models, picture)
        text += [page(dataset, models), f"![LP(1) of each model and truncated samples]({picture.name})\n"]
    arguments.out.write_text("\n".join(text), encoding="utf-8")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
