"""The CAR metric equals the function over all samples, however they are batched."""

import pytest
import torch

from lightning_itk.car_metric import CompatibilityAdjustedReward
from lightning_itk.choice import compatibility_adjusted_reward


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_batches_do_not_matter():
    reward, loss = torch.rand(11), torch.rand(11)
    metric = CompatibilityAdjustedReward(beta=2.0)
    for rows in (slice(0, 7), slice(7, 8), slice(8, 8), slice(8, 11)):
        metric.update(reward[rows], loss[rows])
    expected = compatibility_adjusted_reward(float(reward.double().mean()), float(loss.double().mean()), 2.0)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-12)
    metric.reset()
    assert metric.compute().isnan()


def test_refusals():
    with pytest.raises(ValueError, match="beta must be"):
        CompatibilityAdjustedReward(beta=-1)
    metric = CompatibilityAdjustedReward()
    with pytest.raises(ValueError, match="one reward and one loss per sample"):
        metric.update(torch.zeros(2), torch.zeros(3))
    metric.update(torch.tensor([-1.0]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="rewards must be at least 0"):
        metric.compute()
