"""How surprising given responses are to a model: the mean loss and rank of their tokens, and RSR."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from lightning_itk.losses.chunked import TokenScores
from lightning_itk.metrics import finite_array
from lightning_itk.models.precision import sum_dtype

RANK_LIMIT = 100
"""Ranks above count as this in RSR (arXiv 2601.14249)."""


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


class SampleStatistics(NamedTuple):
    """Means over each sample's response tokens; nan where it has none."""

    loss: Float[Tensor, " samples"]  # mean NLL, nats
    rank: Float[Tensor, " samples"]  # mean of min(rank, 100)
    tokens: Int[Tensor, " samples"]


def sample_statistics(
    scores: TokenScores, sample_ids: Int[Tensor, " N"], samples: int, rank_limit: int = RANK_LIMIT
) -> SampleStatistics:
    """Average token statistics per sample.

    Args:
        scores: of N tokens, with ranks; those of rank 0 are ignored.
        sample_ids: the sample of each token [N]; ignored tokens may have any.
        samples: how many there are.
        rank_limit: ranks above count as this.
    """
    assert scores.rank is not None
    kept = scores.rank > 0
    wide = sum_dtype(scores.nll.device)
    index, nll, rank = sample_ids[kept].long(), scores.nll[kept].to(wide), scores.rank[kept]
    tokens = torch.zeros(samples, dtype=torch.long, device=nll.device).index_add_(0, index, torch.ones_like(index))
    loss = torch.zeros(samples, dtype=wide, device=nll.device).index_add_(0, index, nll) / tokens
    mean_rank = torch.zeros_like(loss).index_add_(0, index, rank.clamp_max(rank_limit).to(wide)) / tokens
    return SampleStatistics(loss, mean_rank, tokens)
