"""Which samples are trained on: the subset that recorded response losses choose, and the validation share."""

import json
import reprlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_itk.data.records import DataError
from lightning_itk.selection.percentage import Metric, Order, sample_scores, select
from lightning_itk.selection.scores import check_records, read_scores


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


def choose(subset: Subset, sample_ids: np.ndarray, tokens: np.ndarray, *, fingerprint: str) -> np.ndarray:
    """The positions in `sample_ids` of the samples to train on.

    Args:
        subset: what to choose.
        sample_ids: record numbers [samples] of the training samples.
        tokens: their response tokens [samples] under the tokenizer of this run.
        fingerprint: of the records.

    Raises:
        DataError: no such scores file, of other records, without the needed columns, or nothing to choose from.
    """
    try:
        recorded = read_scores(subset.scores, epochs=epochs_needed(subset.metric))
        check_records(recorded, fingerprint)
        place = _places(recorded.record, sample_ids)
        scores = sample_scores(subset.metric, _at(recorded.losses, place), tokens)
        clusters = None if subset.clusters is None else clusters_of(subset.clusters, sample_ids, fingerprint)
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
    rank_zero_info(
        f"subset: {len(chosen):,} of {len(sample_ids):,} samples, {subset.order} {subset.metric}, "
        f"scored by {recorded.meta.get('model', 'an unnamed model')} ({recorded.meta['epochs']} epochs)"
    )
    return chosen


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
        mixed = _mix(digests ^ _mix(np.array([seed], np.uint64)))
        last = max(1, round(share * len(digests))) - 1
        cut = np.partition(mixed, last)[last]
        out = mixed <= cut
        if out.all():
            raise DataError("the validation share leaves nothing to train on: all conversations are equal, or too few")
    return out


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: spreads every bit over all."""
    values = values.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))
