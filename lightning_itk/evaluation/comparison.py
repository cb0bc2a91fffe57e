"""Arms of an experiment compared record by record: paired differences, with intervals over records and seeds beside."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Columns = Mapping[str, NDArray]


class Estimate(NamedTuple):
    """A mean with what is known of its error."""

    value: float
    low: float  # of the 95 % interval over records
    high: float
    spread: float  # standard deviation over seeds; nan where there is one


class Row(NamedTuple):
    """One figure of one arm."""

    figure: str
    arm: str
    seeds: int
    records: int
    value: Estimate
    difference: Estimate | None  # from the first arm, None for that


_BY_RECORD = ("exact_match",)
_NO_FIGURES = {"record": "records", "tokens": "numbers of tokens"}


def compare(
    arms: Mapping[str, Sequence[Columns]], *, resamples: int = 2000, seed: int = 0, figures: Sequence[str] = ()
) -> list[Row]:
    """Compare arms on the same records.

    A figure is the mean over response tokens, as validation logs it; `exact_match` is the mean over records. The
    interval is the percentile bootstrap over records, of the mean over seeds: all arms and seeds are resampled with the
    same records, so that differences are paired. It says nothing about other seeds; their spread stands beside it.

    Args:
        arms: by name, the columns of each seed's results, as `results.read_results` gives them.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        figures: which; empty = all that every arm has.

    Raises:
        ValueError: arms of different records or tokens, a figure that an arm lacks, or nothing to compare.
    """
    if not arms:
        raise ValueError("there are no results to compare")
    first = next(iter(arms.values()))[0]
    for name, seeds in arms.items():
        for columns in seeds:
            for key, what in _NO_FIGURES.items():
                if not np.array_equal(columns[key], first[key]):
                    raise ValueError(f"{name} has other {what} than {next(iter(arms))}: they cannot be compared")
    every = [columns for seeds in arms.values() for columns in seeds]
    shared = [name for name in first if name not in _NO_FIGURES and all(name in columns for columns in every)]
    if unknown := [name for name in figures if name not in shared]:
        raise ValueError(f"there is no figure {unknown[0]!r} in every file; there are {', '.join(shared)}")
    if not shared or not len(first["record"]):
        raise ValueError("the files share no figure, or hold no record")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, found {resamples}")
    rows = []
    for figure in figures or shared:
        rows += _rows(figure, arms, first["tokens"], resamples, seed)
    return rows


def _rows(figure: str, arms: Mapping[str, Sequence[Columns]], tokens: NDArray, resamples: int, seed: int) -> list[Row]:
    values = {name: np.stack([columns[figure] for columns in seeds]) for name, seeds in arms.items()}  # [seeds, n]
    known = np.isfinite(np.concatenate(list(values.values()))).all(0) & (tokens > 0)
    weight = (np.ones_like(tokens) if figure in _BY_RECORD else tokens)[known].astype(np.float64)
    if not len(weight):
        return []
    values = {name: found[:, known] for name, found in values.items()}
    drawn = _draws(len(weight), resamples, seed) * weight  # [resamples, n]
    drawn /= drawn.sum(1, keepdims=True)
    share = weight / weight.sum()
    base, rows = next(iter(arms)), []
    for name, found in values.items():
        value = _estimate(found @ share, drawn @ found.mean(0))
        difference = None
        if name != base:
            other = values[base]
            gap = _estimate(found @ share, drawn @ (found.mean(0) - other.mean(0)))
            paired = len(found) == len(other)
            spread = np.std(found @ share - other @ share, ddof=1) if paired and len(found) > 1 else np.nan
            mean = float((found @ share).mean() - (other @ share).mean())
            difference = Estimate(mean, gap.low, gap.high, float(spread))
        rows.append(Row(figure, name, len(found), len(weight), value, difference))
    return rows


def _draws(records: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """How often each record is drawn [resamples, records]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(records, np.full(records, 1 / records), size=resamples).astype(np.float64)


def _estimate(seeds: NDArray, means: NDArray) -> Estimate:
    low, high = np.percentile(means, [2.5, 97.5])
    spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else float("nan")
    return Estimate(float(seeds.mean()), float(low), float(high), spread)
