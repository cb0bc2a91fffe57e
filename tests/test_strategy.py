"""Gradients reduced once per optimizer step under FSDP2: fewer messages, the same training."""

import functools

import pytest
import ranks
import torch
from exact import module
from processes import run_ranks

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("method", "precision", "nonfinite"),
    [("sft", "32-true", False), ("kd", "32-true", False), ("kd", "bf16-mixed", False), ("sft", "32-true", True)],
    ids=["sft", "kd", "kd in half precision", "a step that is skipped"],
)
def test_a_window_reduces_its_gradients_once(method, precision, nonfinite, tmp_path):
    """Windows of 3, 3 and 1 micro-batches; clipped at a norm that the gradients exceed."""
    run_ranks(functools.partial(ranks.reductions, method, precision, nonfinite, tmp_path))
    found = torch.load(tmp_path / "found.pt")
    units = found[True]["steps"][-1]  # of the window of one micro-batch: one reduction for each unit of FSDP2
    assert units == 4  # the embeddings, two layers, and the rest
    assert found[True]["steps"] == [3 * units, 3 * units, units]
    assert found[False]["steps"] == [units, units, units]
    before = torch.cat([p.detach().flatten() for p in module(method).student.parameters()])
    together, apart = found[False]["weights"], found[True]["weights"]
    assert (together - before).norm() > 0.01
    bound = 1e-6 if precision == "32-true" else 1e-2
    assert (together - apart).norm() <= bound * (apart - before).norm()
    figures = {name: value for name, value in found[True]["figures"].items() if name.startswith("train/")}
    for name, value in figures.items():
        assert found[False]["figures"][name] == pytest.approx(value, rel=max(bound, 1e-5)), name
    assert found[True]["figures"].get("train/skipped_steps", 0) == nonfinite
    if not nonfinite:
        assert found[True]["figures"]["train/grad_norm"] > 0.5
