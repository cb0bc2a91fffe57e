"""Means per sample, and RSR."""

import numpy as np
import pytest
import torch

from lightning_itk.choice.statistics import rank_surprisal_ratio, sample_statistics
from lightning_itk.losses.chunked import TokenScores


def test_sample_means():
    ranks = torch.tensor([1, 500, 0, 2, 4])
    scores = TokenScores(torch.tensor([1.0, 3, 0, 5, 7]), torch.zeros(5).long(), ranks)
    loss, rank, tokens = sample_statistics(scores, torch.tensor([0, 0, -1, 2, 2]), 3)
    np.testing.assert_allclose(loss, [2, np.nan, 6])
    np.testing.assert_allclose(rank, [50.5, np.nan, 3])
    assert tokens.tolist() == [2, 0, 2]


def test_rank_surprisal_ratio_is_a_ratio_of_means():
    assert rank_surprisal_ratio([50.5, 3], [2.0, 6]) == pytest.approx((50.5 + 3) / (2 + 6))
    assert np.isnan(rank_surprisal_ratio([1.0], [0.0]))
    with pytest.raises(ValueError, match="one number per sample"):
        rank_surprisal_ratio([1.0], [1.0, 2])
    with pytest.raises(ValueError, match="rank must be finite, found nan"):
        rank_surprisal_ratio([np.nan], [1.0])
