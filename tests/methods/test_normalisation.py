"""Sums of a step and gradients divided by them, on their own; what they are for stands in test_exactness.py."""

import pytest
import torch

from lightning_itk.methods.normalisation import StepSums, scale_gradients


class Ranks:
    """A strategy of two ranks that hold the same."""

    calls = 0

    def reduce(self, tensor, reduce_op):
        self.calls += 1
        assert reduce_op == "sum"
        return 2 * tensor


def test_a_step_ends_when_it_is_reduced():
    sums, ranks, cpu = StepSums(), Ranks(), torch.device("cpu")
    assert sums.reduced(ranks) == {}
    sums.add({"a": 1, "b": torch.tensor(0.5)}, cpu)
    sums.add({"a": 2, "b": torch.tensor(0.25)}, cpu)
    assert sums.begun == 2
    first = sums.reduced(ranks)
    assert sums.begun == 0
    assert {name: value.item() for name, value in first.items()} == {"a": 6, "b": 1.5}
    assert sums.reduced(ranks) is first  # a second optimizer sees the same step
    assert ranks.calls == 1
    sums.add({"a": 5, "b": 0}, cpu)
    assert sums.reduced(ranks)["a"] == 10
    assert first["a"].dtype == torch.float64


def test_gradients_of_any_precision_are_scaled():
    factor = torch.tensor(1 / 3, dtype=torch.float64)
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32]
    parameters = [torch.nn.Parameter(torch.randn(3, 5).to(dtype)) for dtype in dtypes]
    for parameter in parameters[:3]:
        parameter.grad = torch.randn_like(parameter)
    before = [p.grad.double().clone() for p in parameters[:3]]
    scale_gradients(iter(parameters), factor)
    for parameter, grad, tolerance in zip(parameters, before, (1e-6, 8e-3, 1e-15), strict=False):
        torch.testing.assert_close(parameter.grad.double(), grad / 3, rtol=tolerance, atol=0)
    assert parameters[3].grad is None


def test_counts_beyond_fp32_stay_exact():
    sums = StepSums()
    for value in (2**24, 1):
        sums.add({"targets": value}, torch.device("cpu"))
    assert sums.reduced(Ranks())["targets"].item() == pytest.approx(2 * (2**24 + 1), abs=0)
