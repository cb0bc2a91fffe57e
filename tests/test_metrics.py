import pytest
import torch

from lightning_itk.choice import compatibility_adjusted_reward
from lightning_itk.metrics import (
    CompatibilityAdjustedReward,
    ExactMatch,
    ResponsePerplexity,
    TeacherAgreement,
    TokenMean,
    WinRate,
)


def test_means_weigh_elements_not_batches():
    mean, perplexity = TokenMean(), ResponsePerplexity()
    for metric in (mean, perplexity):
        metric.update(torch.tensor(10.0), 5)
        metric.update(torch.tensor(2.0), torch.tensor(1))
        metric.update(torch.tensor(0.0), 0)
    assert mean.compute() == 2.0
    assert perplexity.compute() == pytest.approx(torch.tensor(2.0).exp().item())
    assert TokenMean().compute() == 0


def test_agreement_match_and_wins():
    agreement = TeacherAgreement()
    agreement.update(torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3]))
    assert agreement.compute() == pytest.approx(2 / 3)
    match = ExactMatch()
    match.update([" 12  EUR\n", "no"], ["12 EUR", "yes"])
    assert match.compute() == 0.5
    wins = WinRate()
    wins.update(torch.tensor([1.0, 2.0, 0.0, 3.0]), torch.tensor([0.0, 2.0, 1.0, 1.0]))
    assert wins.compute() == 0.625
    with pytest.raises(ValueError, match="1 answers but 2 references"):
        match.update(["a"], ["a", "b"])


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_the_car_of_batches_is_that_of_all_samples():
    reward, loss = torch.rand(11), torch.rand(11)
    metric = CompatibilityAdjustedReward(beta=2.0)
    for rows in (slice(0, 7), slice(7, 8), slice(8, 8), slice(8, 11)):
        metric.update(reward[rows], loss[rows])
    expected = compatibility_adjusted_reward(float(reward.double().mean()), float(loss.double().mean()), 2.0)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-12)
    metric.reset()
    assert metric.compute().isnan()


def test_car_refuses():
    with pytest.raises(ValueError, match="beta must be"):
        CompatibilityAdjustedReward(beta=-1)
    metric = CompatibilityAdjustedReward()
    with pytest.raises(ValueError, match="one reward and one loss per sample"):
        metric.update(torch.zeros(2), torch.zeros(3))
    metric.update(torch.tensor([-1.0]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="rewards must be at least 0"):
        metric.compute()
