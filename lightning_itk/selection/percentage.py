"""Learning percentage and subsets: pure functions over arrays of per-sample numbers (arXiv 2402.10430).

A sample that is learned late has a small learning percentage: it is hard, and it is what the paper trains on. Every
function takes NumPy arrays or torch tensors and answers in kind. Nothing loops over rows or clusters. A selection needs
5 bytes a row beside its arguments, up to 48 with numbered clusters and float64 scores: 100 million rows fit in 7 GB.
"""

from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lightning_itk.selection.quotas import compact, lowest_by_quota

Order = Literal["lowest", "highest", "middle", "random"]
Metric = Literal["lp_app", "lp", "loss", "length"]

_BLOCK = 1 << 16  # columns whose temporaries stay in the cache


def learning_percentage(losses: ArrayLike | Tensor) -> Any:
    """LP(1): the share of all perplexity drop that the first epoch brings, (P_0 - P_1) / (P_0 - P_n).

    Computed from differences of losses, so no perplexity exp(loss) overflows. A sample that got worse both in the first
    epoch and in the end has a positive LP(1), as in the paper.

    Args:
        losses: mean response NLL in nats [epochs + 1, samples], before training and after each epoch; nan = none.

    Returns:
        LP(1) [samples], 0.2 = 20 %; nan where a loss is nan or where P_0 = P_n leaves it undefined.

    Raises:
        ValueError: losses are not [epochs + 1 >= 2, samples] or one of them is infinite.

    Source: arXiv 2402.10430, LP(i) with i = 1.
    """

    def ratio(block: NDArray[np.float64]) -> NDArray[np.float64]:
        first, last = block[1] - block[0], block[-1] - block[0]
        # expm1(d) = exp(max(d, 0)) * grown(d), with grown in [-1, 1]: the large factors meet before they overflow.
        scale = np.exp(np.maximum(first, 0) - np.maximum(last, 0))
        grown_first, grown_last = (np.copysign(np.expm1(-np.abs(d)), d) for d in (first, last))
        return np.where(last == 0, np.nan, scale * grown_first / np.where(last == 0, 1, grown_last))

    return _over_losses(losses, ratio)


def approximate_learning_percentage(losses: ArrayLike | Tensor) -> Any:
    """LP_app(1) = (P_0 - P_1) / P_0 = 1 - exp(loss_1 - loss_0), which needs one epoch only.

    Ranking by it is ranking by the loss drop of the first epoch.

    Args:
        losses: mean response NLL in nats [epochs + 1, samples]; the first two rows are read; nan = no response.

    Returns:
        LP_app [samples]; nan where a loss is nan; negative where the first epoch made the sample worse.

    Raises:
        ValueError: losses are not [epochs + 1 >= 2, samples] or one of them is infinite.

    Source: arXiv 2402.10430, LP_app.
    """
    return _over_losses(losses, lambda block: -np.expm1(block[1] - block[0]), rows=2)


def instruction_following_difficulty(loss: ArrayLike | Tensor, loss_without_instruction: ArrayLike | Tensor) -> Any:
    """IFD: mean response loss given the instruction over the loss of the response alone (arXiv 2308.12032).

    Args:
        loss: mean response NLL after the instruction [samples].
        loss_without_instruction: mean NLL of the same responses on their own [samples].

    Returns:
        IFD [samples], nan where a loss is nan or the denominator is 0. Its authors drop samples of 1 and above
        (the instruction does not help) and select the highest of the others.
    """
    given, alone = _array(loss).astype(np.float64), _array(loss_without_instruction).astype(np.float64)
    if given.shape != alone.shape:
        raise ValueError(f"IFD needs two losses per sample, found shapes {given.shape} and {alone.shape}")
    with np.errstate(divide="ignore", invalid="ignore"):
        return _like(loss, np.where(alone == 0, np.nan, given / alone))


def sample_scores(metric: Metric, losses: ArrayLike | Tensor, tokens: ArrayLike | Tensor | None = None) -> Any:
    """The number that samples are ranked by.

    Args:
        metric: lp_app, lp, loss (before training) or length (response tokens).
        losses: mean response NLL [epochs + 1, samples].
        tokens: response tokens [samples]; samples without any are undefined.

    Returns:
        float scores [samples]; nan = undefined, which `select` drops before it ranks.

    Raises:
        ValueError: unknown metric, too few epochs for it, or tokens missing or of another length.
    """
    if metric not in get_args(Metric):
        raise ValueError(f"unknown metric {metric!r}, expected one of {', '.join(get_args(Metric))}")
    values = _array(losses)
    needed = {"lp": 3, "lp_app": 2}.get(metric, 1)
    if values.ndim != 2 or len(values) < needed:
        raise ValueError(f"{metric} needs losses [epochs + 1 >= {needed}, samples], found shape {values.shape}")
    if metric == "lp":
        scores = learning_percentage(values)
    elif metric == "lp_app":
        scores = approximate_learning_percentage(values)
    else:
        scores = values[0].copy()
    if tokens is not None or metric == "length":
        lengths = _array([] if tokens is None else tokens)
        if lengths.shape != scores.shape:
            raise ValueError(f"tokens must have one entry per sample: found {lengths.shape}, expected {scores.shape}")
        # float32 holds whole numbers up to 2^24, far beyond any response.
        scores = np.where(lengths > 0, lengths if metric == "length" else scores, np.nan).astype(scores.dtype)
    return _like(losses, scores)


def select(
    scores: ArrayLike | Tensor,
    fraction: float,
    *,
    clusters: ArrayLike | Tensor | None = None,
    order: Order = "lowest",
    seed: int = 0,
) -> Any:
    """Choose round(fraction * defined samples) of the samples, exactly; Python's round, halves to even.

    Samples with nan scores are dropped before ranking. Equal scores are taken in index order. With clusters, each gets
    its proportional share by largest remainder; between equal remainders the cluster whose next sample ranks first wins
    (order middle: the cluster in the middle), and where these score the same, the lower label.

    Args:
        scores: one number per sample [samples]; nan = undefined.
        fraction: share of the defined samples, in (0, 1].
        clusters: the cluster of each sample [samples], whole numbers or strings; None = one cluster.
        order: lowest, highest, middle (as many left out below as above) or random.
        seed: of order random.

    Returns:
        Sorted int64 indices, a tensor if `scores` is one.

    Raises:
        ValueError: scores not one-dimensional or infinite, a fraction outside (0, 1], an unknown order, clusters of
            another length or kind.
    """
    values = _array(scores)
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float64)
    if values.ndim != 1:
        raise ValueError(f"scores must be one number per sample, found shape {values.shape}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, found {fraction}")
    if order not in get_args(Order):
        raise ValueError(f"unknown order {order!r}, expected one of {', '.join(get_args(Order))}")
    if np.isinf(values).any():
        sample = int(np.flatnonzero(np.isinf(values))[0])
        raise ValueError(f"scores must be finite or nan, found {values[sample]} at sample {sample}")
    labels = None if clusters is None else compact(_array(clusters), len(values))
    if order == "highest":
        values = -values
    elif order == "random":
        values = np.where(np.isnan(values), np.nan, np.random.default_rng(seed).random(len(values)))
    chosen = lowest_by_quota(values, fraction, labels, middle=order == "middle")
    return _like(scores, chosen)


def thirds(scores: ArrayLike | Tensor, clusters: ArrayLike | Tensor | None = None) -> tuple[Any, Any, Any]:
    """The lowest, middle and highest third of the defined samples, within each cluster (the paper's bucket study).

    Args:
        scores: one number per sample [samples]; nan = undefined, in no third.
        clusters: as in `select`.

    Returns:
        Three disjoint arrays of sorted int64 indices that cover all defined samples.
    """
    rest = np.array(_array(scores), dtype=np.float64)
    parts = []
    for share in (1 / 3, 1 / 2, 1.0):
        part = select(rest, share, clusters=clusters)
        rest[part] = np.nan
        parts.append(_like(scores, part))
    low, middle, high = parts
    return low, middle, high


def describe(
    scores: ArrayLike | Tensor, tokens: ArrayLike | Tensor, chosen: ArrayLike | Tensor, *, seed: int = 0
) -> dict[str, float]:
    """What a selection holds and how far a trivial one would be the same.

    Args:
        scores: what was ranked [samples]; nan = undefined.
        tokens: response tokens [samples].
        chosen: indices of the selected samples.
        seed: of the random selection to compare with.

    Returns:
        samples, defined, dropped (undefined), without_response, selected; mean_tokens and mean_tokens_all (of the
        selected and of all defined samples); lowest and highest selected score; overlap_random and overlap_longest, the
        share of the selected samples that a random and the longest-response selection of the same size also hold.
    """
    values, lengths, picked = _array(scores), _array(tokens), _array(chosen)
    defined = ~np.isnan(values)
    summary: dict[str, float] = {
        "samples": len(values),
        "defined": int(defined.sum()),
        "dropped": int((~defined).sum()),
        "without_response": int((lengths == 0).sum()),
        "selected": len(picked),
    }
    if not len(picked):
        return summary
    share = len(picked) / int(defined.sum())
    usable = np.where(defined, lengths, np.nan)
    taken = np.zeros(len(values), np.bool_)
    taken[picked] = True
    return summary | {
        "mean_tokens": float(lengths[picked].mean()),
        "mean_tokens_all": float(lengths[defined].mean()),
        "lowest": float(values[picked].min()),
        "highest": float(values[picked].max()),
        "overlap_random": float(taken[select(values, share, order="random", seed=seed)].mean()),
        "overlap_longest": float(taken[select(usable, share, order="highest")].mean()),
    }


def _over_losses(losses: ArrayLike | Tensor, formula: Any, rows: int | None = None) -> Any:
    """Apply a formula of [epochs + 1, samples] in float64, some columns at a time; precision as given."""
    values = _array(losses)
    if values.ndim != 2 or len(values) < 2:
        raise ValueError(f"losses must be [epochs + 1 >= 2, samples], found shape {values.shape}")
    values = values[:rows]
    result = np.empty(values.shape[1], values.dtype if values.dtype in (np.float32, np.float64) else np.float64)
    for start in range(0, values.shape[1], _BLOCK):
        block = values[:, start : start + _BLOCK].astype(np.float64)
        if np.isinf(block).any():
            epoch, sample = np.argwhere(np.isinf(block))[0]
            raise ValueError(
                f"losses must be finite or nan, found {block[epoch, sample]} at [{epoch}, {start + sample}]"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            result[start : start + _BLOCK] = formula(block)
    return _like(losses, result)


def _array(values: ArrayLike | Tensor) -> NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
    return np.asarray(values)


def _like(source: ArrayLike | Tensor, result: NDArray[Any]) -> Any:
    return torch.from_numpy(result).to(source.device) if isinstance(source, Tensor) else result
