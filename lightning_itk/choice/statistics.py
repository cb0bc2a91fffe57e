"""How surprising given tokens are to a model: their loss and their rank, per token and per sample, and RSR."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

RANK_LIMIT = 100
"""Ranks above count as this in RSR (arXiv 2601.14249)."""

_BLOCK = 1 << 24  # logits held at once


def rank_surprisal_ratio(ranks: ArrayLike, losses: ArrayLike) -> float:
    """RSR = mean over samples of the mean clipped rank / mean over samples of the mean NLL. Lower is better.

    Args:
        ranks: mean over response tokens of min(rank, 100) under the student [samples], see `sample_statistics`.
        losses: mean NLL over the same tokens in nats [samples].

    Returns:
        RSR; nan where the mean loss is 0.

    Source: arXiv 2601.14249, the ratio of a whole data set (not the mean of the samples' ratios).
    """
    rank, loss = finite_array("rank", ranks), finite_array("loss", losses)
    if rank.shape != loss.shape or rank.ndim != 1:
        raise ValueError(f"ranks and losses must be one number per sample, found {rank.shape} and {loss.shape}")
    return float(rank.mean() / loss.mean()) if loss.any() else float("nan")


class TokenStatistics(NamedTuple):
    """What the student thinks of given tokens."""

    nll: Float[Tensor, " N"]  # nats; 0 where the label is ignored
    rank: Int[Tensor, " N"]  # 1 = the likeliest token; 0 where the label is ignored


@torch.no_grad()
def token_statistics(
    rows: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    head: Tensor | Callable[[Tensor], Tensor] | None = None,
    *,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> TokenStatistics:
    """Loss and rank of the label in each row, some rows at a time, without holding all logits.

    Args:
        rows: logits [N, vocab], or hidden states [N, H] with a head.
        labels: [N], already aligned with the rows.
        head: weight [vocab, H], or a function from hidden states to logits; None = the rows are logits.
        ignore_index: the label of rows to skip.
        chunk_rows: rows at a time; None = about 64 MB of fp32 logits.

    Returns:
        NLL and rank [N]. The rank is 1 + the number of tokens with a strictly higher logit.
    """
    if labels.shape != rows.shape[:1] or rows.ndim != 2:
        raise ValueError(f"rows [N, D] and labels [N] must agree, found {tuple(rows.shape)} and {tuple(labels.shape)}")
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    nll = torch.zeros(len(rows), dtype=wide, device=rows.device)
    rank = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    kept = (labels != ignore_index).nonzero().flatten()
    if chunk_rows is None:
        width = head.shape[0] if isinstance(head, Tensor) else rows.shape[1] if head is None else 1 << 17
        chunk_rows = max(1, _BLOCK // width)
    for part in kept.split(chunk_rows):
        logits = rows[part]
        if head is not None:
            logits = logits @ head.T if isinstance(head, Tensor) else head(logits)
        logits, label = logits.to(wide), labels[part]
        nll[part] = F.cross_entropy(logits, label, reduction="none")
        rank[part] = 1 + (logits > logits.gather(1, label[:, None])).sum(1)
    return TokenStatistics(nll, rank)


class SampleStatistics(NamedTuple):
    """Means over each sample's response tokens; nan where it has none."""

    loss: Float[Tensor, " samples"]  # mean NLL, nats
    rank: Float[Tensor, " samples"]  # mean of min(rank, 100)
    tokens: Int[Tensor, " samples"]


def sample_statistics(
    statistics: TokenStatistics, sample_ids: Int[Tensor, " N"], samples: int, rank_limit: int = RANK_LIMIT
) -> SampleStatistics:
    """Average token statistics per sample.

    Args:
        statistics: of N tokens; those of rank 0 are ignored.
        sample_ids: the sample of each token [N]; ignored tokens may have any.
        samples: how many there are.
        rank_limit: ranks above count as this.
    """
    kept = statistics.rank > 0
    index, nll, rank = sample_ids[kept].long(), statistics.nll[kept].double(), statistics.rank[kept]
    tokens = torch.zeros(samples, dtype=torch.long, device=nll.device).index_add_(0, index, torch.ones_like(index))
    loss = torch.zeros(samples, dtype=torch.float64, device=nll.device).index_add_(0, index, nll) / tokens
    mean_rank = torch.zeros_like(loss).index_add_(0, index, rank.clamp_max(rank_limit).double()) / tokens
    return SampleStatistics(loss, mean_rank, tokens)


def finite_array(what: str, values: Any) -> NDArray[np.float64]:
    """Numbers, arrays or tensors as float64; refused by the name `what` where one is nan or infinite."""
    array = np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{what} must be finite, found {array[~np.isfinite(array)].flat[0]}")
    return array
