"""Token loss and rank against a plain reference, and RSR."""

import numpy as np
import pytest
import torch

from lightning_itk.choice.statistics import TokenStatistics, rank_surprisal_ratio, sample_statistics, token_statistics


@pytest.mark.parametrize("chunk_rows", [None, 1, 7])
def test_loss_and_rank_of_labels(chunk_rows):
    torch.manual_seed(0)
    hidden, head = torch.randn(41, 16, dtype=torch.float64), torch.randn(101, 16, dtype=torch.float64)
    labels = torch.randint(0, 101, (41,))
    labels[::5] = -100
    logits = hidden @ head.T
    kept = labels != -100
    expected_nll = -logits.log_softmax(-1)[kept, labels[kept]]
    order = logits.argsort(-1, descending=True)
    expected_rank = (order[kept] == labels[kept, None]).long().argmax(1) + 1
    for rows, head_ in ((hidden, head), (logits, None), (hidden, lambda h: h @ head.T)):
        nll, rank = token_statistics(rows, labels, head_, chunk_rows=chunk_rows)
        torch.testing.assert_close(nll[kept], expected_nll)
        torch.testing.assert_close(rank[kept], expected_rank)
        assert not nll[~kept].any()
        assert not rank[~kept].any()


def test_all_ignored_and_bf16():
    nll, rank = token_statistics(torch.randn(3, 5), torch.full((3,), -100))
    assert not nll.any()
    assert not rank.any()
    logits = torch.tensor([[1000.0, 0, 1000]], dtype=torch.bfloat16)
    nll, rank = token_statistics(logits, torch.tensor([2]))
    assert nll.dtype == torch.float32
    assert rank.tolist() == [1]
    assert nll.item() == pytest.approx(np.log(2))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"found \(3, 5\) and \(4,\)"):
        token_statistics(torch.zeros(3, 5), torch.zeros(4, dtype=torch.long))


def test_sample_means():
    statistics = TokenStatistics(torch.tensor([1.0, 3, 0, 5, 7]), torch.tensor([1, 500, 0, 2, 4]))
    loss, rank, tokens = sample_statistics(statistics, torch.tensor([0, 0, -1, 2, 2]), 3)
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
