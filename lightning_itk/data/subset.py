"""Which samples are trained on: the subset that recorded response losses choose, and the validation share."""

import json
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_itk.data.content import local_hash
from lightning_itk.data.order import blocks
from lightning_itk.data.records import DataError
from lightning_itk.selection.percentage import Metric, Order, sample_scores, select
from lightning_itk.selection.scores import check_records, read_meta, read_scores


@dataclass
class Subset:
    """Which part of the training samples to train on.

    Args:
        scores: Parquet file of response losses, written by ResponseLossRecorder for the same records.
        metric: lp_app or lp (learning percentage), loss (before training) or length (response tokens).
        fraction: share of the scored samples, in (0, 1].
        order: lowest (learned late: hard), highest, middle or random.
        clusters: choose the same share of every cluster: a Parquet file with the columns record and cluster.
        seed: of order random.
    """

    scores: str
    metric: Metric = "lp_app"
    fraction: float = 0.1
    order: Order = "lowest"
    clusters: str | None = None
    seed: int = 0


def choose(
    subset: Subset, pool: np.ndarray, sample_ids: np.ndarray, tokens: np.ndarray, *, fingerprint: str
) -> np.ndarray:
    """The numbers of the samples to train on, ascending.

    Args:
        subset: what to choose.
        pool: numbers of the samples to choose from, ascending.
        sample_ids: record numbers of all samples [samples].
        tokens: their response tokens [samples] under the tokenizer of this run.
        fingerprint: of the records.

    Raises:
        DataError: no such scores file, of other records, without the needed columns, or nothing to choose from.
    """
    try:
        recorded = read_scores(subset.scores, epochs=epochs_needed(subset.metric))
        check_records(recorded, fingerprint)
        scores = np.empty(len(pool), recorded.losses.dtype)
        for part in blocks(len(pool)):
            place = _places(recorded.record, sample_ids[pool[part]])
            scores[part] = sample_scores(subset.metric, _at(recorded.losses, place), tokens[pool[part]])
        del recorded
        clusters = None if subset.clusters is None else clusters_of(subset.clusters, sample_ids[pool], fingerprint)
        chosen = select(scores, subset.fraction, clusters=clusters, order=subset.order, seed=subset.seed)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"subset of {subset.scores}: {error}") from None
    if len(chosen) == 0:
        raise DataError(
            f"{subset.scores}: the subset is empty: {int(np.isfinite(scores).sum())} of {len(scores)} training "
            f"samples have a score, fraction is {subset.fraction}"
        )
    return pool[chosen]


def depends_on(subset: Subset, notes: Path | None) -> list[Any]:
    """What a choice depends on beside the samples: the settings, and what the files hold. Raises DataError."""
    files = [None if path is None else local_hash(path, notes) for path in (subset.scores, subset.clusters)]
    return [files, {name: value for name, value in vars(subset).items() if name not in ("scores", "clusters")}]


def say(subset: Subset, chosen: int, samples: int) -> None:
    """One line on what was chosen."""
    meta = read_meta(subset.scores)
    rank_zero_info(
        f"subset: {chosen:,} of {samples:,} samples, {subset.order} {subset.metric}, "
        f"scored by {meta.get('model', 'an unnamed model')} ({meta['epochs']} epochs)"
    )


def epochs_needed(metric: Metric) -> int | None:
    """The epochs of losses that a metric looks at; None = all there are."""
    return {"lp": None, "lp_app": 1}.get(metric, 0)


def _places(records: np.ndarray, sample_ids: np.ndarray) -> np.ndarray:
    """Where each sample stands in ascending record numbers, -1 where it does not."""
    if not len(records):
        return np.full(len(sample_ids), -1)
    found = np.searchsorted(records, sample_ids).clip(max=len(records) - 1)
    return np.where(records[found] == sample_ids, found, -1)


def _at(losses: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Columns of losses [epochs + 1, records] by place; nan for -1."""
    if not losses.shape[1]:
        return np.full((len(losses), len(place)), np.nan)
    return np.where(place >= 0, losses[:, place], np.nan)


def clusters_of(path: str, sample_ids: np.ndarray, fingerprint: str) -> np.ndarray:
    """The cluster of each sample; samples that the Parquet file does not name form one of their own.

    Raises:
        DataError: not such a file, or one that says that it was made on other records.
    """
    record, cluster = _read_clusters(path, fingerprint)
    place = _places(record, sample_ids)
    if not len(cluster):
        return np.full(len(sample_ids), -1)
    return np.where(place >= 0, cluster[place], -1)


def _read_clusters(path: str, fingerprint: str) -> tuple[np.ndarray, np.ndarray]:
    """Record numbers, ascending, and their clusters."""
    try:
        table = pq.read_table(path, columns=["record", "cluster"]).sort_by("record")
        noted = json.loads((table.schema.metadata or {}).get(b"itk", b"{}"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read as Parquet with the columns record and cluster: {reason}") from None
    record = table.column("record")
    if not pa.types.is_integer(record.type) or record.null_count:
        raise DataError(f"{path}: column record holds {record.type} or empty values, expected record numbers")
    if not isinstance(noted, dict):
        raise DataError(f"{path}: broken 'itk' metadata, expected an object")
    if noted.get("fingerprint", fingerprint) != fingerprint:
        found = f"fingerprint {reprlib.repr(noted['fingerprint'])}, the data has {fingerprint}"
        raise DataError(f"{path}: made on other records or in another order ({found})")
    return record.to_numpy(), table.column("cluster").to_numpy()


def held_out(digests: np.ndarray, share: float, seed: int) -> np.ndarray:
    """True for round(share * samples) samples, at least one; equal conversations stay on one side.

    Args:
        digests: uint64 hash of each sample's conversation [samples].
        share: of the samples to hold out.
        seed: another seed holds out others.

    Chosen by a hash of the conversation, so that a sample keeps its side whatever else is in the data set.
    """
    out = np.zeros(len(digests), bool)
    if share > 0:
        if len(digests) < 2:
            raise DataError("a validation share needs at least 2 samples: set validation to 0 or to a file")
        key = _mix(np.array([seed], np.uint64))

        def mixed() -> Iterator[np.ndarray]:
            return (_mix(digests[part] ^ key) for part in blocks(len(digests)))

        cut = _nth(mixed, max(1, round(share * len(digests))) - 1)
        for part, some in zip(blocks(len(digests)), mixed(), strict=True):
            out[part] = some <= cut
        if out.all():
            raise DataError("the validation share leaves nothing to train on: all conversations are equal, or too few")
    return out


def _nth(values: Callable[[], Iterator[np.ndarray]], number: int) -> np.uint64:
    """The value that would have this number if all blocks of uint64 were sorted, without a copy of them all."""
    sizes = np.zeros(1 << 16, np.int64)  # by the highest 16 bits
    for some in values():
        sizes += np.bincount((some >> np.uint64(48)).astype(np.int64), minlength=len(sizes))
    ends = np.cumsum(sizes)
    group = int(np.searchsorted(ends, number, side="right"))
    within = np.concatenate([some[some >> np.uint64(48) == group] for some in values()])
    number -= int(ends[group] - sizes[group])
    return np.uint64(np.partition(within, number)[number])


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: spreads every bit over all."""
    values = values.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))
