"""`select`: choose records by recorded scores."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from lightning_itk.cli.records import check_not_data, column_value, index_records, text_to_embed, write_records
from lightning_itk.data.records import DataError, Invalid
from lightning_itk.data.sources import Sources, as_sources
from lightning_itk.data.subset import clusters_of, epochs_needed
from lightning_itk.data.tools import Tools
from lightning_itk.outputs import check_output, note_output
from lightning_itk.selection.clusters import DEFAULT_EMBEDDER, embed, kmeans, write_clusters
from lightning_itk.selection.percentage import Metric, Order, describe, sample_scores, select
from lightning_itk.selection.scores import Scores, check_records, read_meta, read_scores


def select_records(
    scores: str,
    data: Sources,
    output: str,
    fraction: float = 0.1,
    metric: Literal["lp_app", "lp", "loss", "length", "random"] = "lp_app",
    order: Order = "lowest",
    clusters: int | str | None = None,
    embedder: str = DEFAULT_EMBEDDER,
    invalid: Invalid = "refuse",
    tools: Tools = "refuse",
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Choose records by recorded scores and write them to a file, with a picture of the choice beside it.

    Args:
        scores: Scores file of ResponseLossRecorder, made on these data.
        data: The data that were scored: a file, folder, glob, URL or hub name, or several, as in data.train.
        output: JSON Lines file to write: the chosen records as they are, in their order.
        fraction: Share of the scored records, in (0, 1].
        metric: lp_app or lp (learning percentage), loss (before training), length (response tokens) or random.
        order: lowest (of lp_app: learned late, hard), highest, middle or random.
        clusters: Choose the same share of every cluster: a number (embed the records and run k-means), a column of
            the records, or a Parquet file with the columns record and cluster.
        embedder: sentence-transformers model for a number of clusters.
        invalid: drop = pass over records that cannot be used, as the data module did with data.invalid drop.
        tools: learn = take records with tools, as the data module did with data.tools learn.
        seed: Of random choices and of k-means.
        overwrite: Replace what an earlier run wrote, if it is unchanged; nothing else is ever replaced.
    """
    sources, console = as_sources(data), Console()
    if len({(str(source.columns), source.teacher) for source in sources}) > 1:
        raise DataError("the sources differ in columns or teacher, which one output file cannot tell: select from each")
    if not 0 < fraction <= 1 or (isinstance(clusters, int) and clusters < 1):
        raise ValueError(
            f"fraction must be above 0 and at most 1, clusters at least 1, found {fraction} and {clusters}"
        )
    check_not_data(output, sources)
    picture, clusters_file = Path(output).with_suffix(".png"), Path(output).with_suffix(".clusters.parquet")
    if picture == Path(output):
        raise ValueError(f"{output}: is the name of the picture, name the records' file otherwise")
    draw = find_spec("matplotlib") is not None
    written = [Path(output), *([picture] if draw else []), *([clusters_file] if isinstance(clusters, int) else [])]
    for path in written:
        check_output(path, overwrite)
    ranked: Metric = "loss" if metric == "random" else metric
    read_meta(scores)  # what is wrong with the small file shows before the large ones are read
    keep = text_to_embed if isinstance(clusters, int) else None
    if isinstance(clusters, str) and not clusters.endswith(".parquet"):
        keep = column_value(clusters)  # type: ignore[assignment]
    found = index_records(sources, keep, invalid, tools)
    recorded = read_scores(scores, epochs=epochs_needed(ranked))
    check_records(recorded, found.fingerprint)
    values = sample_scores(ranked, recorded.losses, recorded.tokens)
    defined = int((~np.isnan(values)).sum())
    if round(fraction * defined) == 0:
        raise DataError(f"{scores}: nothing is chosen: fraction {fraction} of {defined} records with a score")
    labels = None
    if isinstance(clusters, int):
        labels = _clustered(clusters_file, recorded, found.kept, ~np.isnan(values), clusters, embedder, seed, console)
    elif keep is not None:
        labels = np.array(found.kept)[recorded.record]
    elif clusters is not None:
        labels = clusters_of(str(clusters), recorded.record, found.fingerprint)
    chosen = select(values, fraction, clusters=labels, order="random" if metric == "random" else order, seed=seed)
    summary = describe(values, recorded.tokens, chosen, seed=seed + 1)
    for path in written[: 1 + draw]:
        check_output(path, overwrite)  # again: clusters take their time
    write_records(output, sources, recorded.record[chosen])
    note_output(output)
    rule = "random" if metric == "random" else f"{order} {metric}"
    console.print(selection_table(recorded, summary, found.count, rule, labels))
    console.print(f"wrote {len(chosen):,} records to {output}", soft_wrap=True, highlight=False)
    if not draw:
        console.print("no picture: pip install 'lightning-itk\\[report]'")
        return
    from lightning_itk.report.pictures import draw_selection

    groups, kind = labels, "cluster"
    if groups is None and len(sources) > 1:
        names = [source.name for source in sources]
        groups, kind = np.repeat(names, found.source)[recorded.record], "source"
    draw_selection(picture, values, recorded.tokens, chosen, metric=ranked, groups=groups, group_kind=kind)
    note_output(picture)
    console.print(f"picture {picture}", soft_wrap=True, highlight=False)


def _clustered(
    path: Path, recorded: Scores, texts: list[str], defined: Any, count: int, embedder: str, seed: int, console: Any
) -> np.ndarray:
    """k-means clusters of the scored records, also written beside the output so that they need not be made again."""
    if find_spec("sklearn") is None:  # known before the embedding, which takes longest
        raise ImportError("clustering needs scikit-learn: pip install 'lightning-itk[cluster]'")
    rows = np.flatnonzero(defined)
    vectors = embed([texts[record] for record in recorded.record[rows]], embedder, progress=console.is_terminal)
    labels = np.full(len(defined), -1, np.int64)
    labels[rows] = kmeans(vectors, count, seed)
    write_clusters(path, recorded.record[rows], labels[rows], recorded.meta["fingerprint"])
    note_output(path)
    console.print(f"clusters {path} (give it to --clusters or data.subset.clusters)", soft_wrap=True, highlight=False)
    return labels


def selection_table(
    recorded: Scores, summary: dict[str, float], records: int, rule: str, labels: np.ndarray | None = None
) -> Table:
    """What a selection holds.

    Args:
        recorded: the scores.
        summary: of `selection.describe`.
        records: how many the data have.
        rule: how they were chosen, in words.
        labels: the cluster of each scored record.
    """
    meta = recorded.meta
    rows = {
        "scored by": f"{meta.get('model', 'an unnamed model')}, epochs {meta['epochs']}",
        "records": f"{records:,}, scored {summary['samples']:,.0f}",
        "dropped before scoring": f"{records - summary['samples']:,.0f}",
        "score undefined": f"{summary['dropped']:,.0f}, {summary['without_response']:,.0f} without response",
        "chosen": f"{summary['selected']:,.0f}, {rule}",
        "score of the chosen": f"{summary['lowest']:.4g} to {summary['highest']:.4g}",
        "mean response tokens": f"{summary['mean_tokens']:.1f} chosen, {summary['mean_tokens_all']:.1f} all",
        "same as a random choice": f"{summary['overlap_random']:.1%}",
        "same as the longest responses": f"{summary['overlap_longest']:.1%}",
    }
    if labels is not None:
        rows["clusters"] = f"{len(np.unique(labels[~np.isnan(recorded.losses[0])])):,}"
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
