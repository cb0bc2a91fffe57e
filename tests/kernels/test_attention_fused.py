"""dq and dk from one kernel in the Triton interpreter: against fp64 on whole maps, and against the two kernels."""

import pytest
import torch
from interpreter import inside, outside, run_in_the_interpreter
from maps import PACKED, answers, check, padding, problem

pytest.importorskip("triton")
from lightning_itk.kernels import attention_problem
from lightning_itk.kernels.attention import attention_kl

pytestmark = pytest.mark.interpret


@outside
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def splits(monkeypatch):
    """Ask for the fused kernel; returns the numbers of splits that it ran with."""
    found: list[int] = []

    def two(*args):
        found.append(min(2, launched(*args)))  # of four blocks of keys, so that a program walks more than one
        return found[-1]

    launched = attention_problem.fused_splits
    monkeypatch.setattr(attention_problem, "fused_splits", two)
    monkeypatch.setattr(attention_problem, "FUSED_BACKWARD", True)
    return found


MASKS = [{}, {"window": 7}, {"cu_seqlens": PACKED}, {"key_mask": padding(), "row_mask": answers()}, {"causal": False}]


@inside
@pytest.mark.parametrize("kind", ["forward", "reverse"])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: next(iter(mask), "causal"))
def test_masks(kind, mask, splits):
    tensors, options = problem(heads=(2, 1, 2, 1))
    check(tensors, options | mask | {"kind": kind})
    assert splits == [2]


@inside
@pytest.mark.parametrize("heads", [(4, 1, 4, 2), (2, 2, 6, 3), (4, 4, 2, 1)], ids=str)
def test_grouped_heads_on_either_side(heads):
    check(*problem(heads=heads, length=37, dims=(24, 16)))


@inside
@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_everything_at_once(kind):
    tensors, options = problem(heads=(2, 2, 4, 2))
    options |= {"window": 20, "cu_seqlens": PACKED, "key_mask": padding(), "row_mask": answers(), "kind": kind}
    check(tensors, options | {"temperature": 2.0, "softcap_student": 3.0, "softcap_teacher": 4.0})


@inside
def test_half_precision():
    tensors, options = problem(batch=1, length=40, heads=(2, 1, 2, 1))
    check(tuple(x.half() for x in tensors), options, tolerance=3e-3)


@inside
def test_keys_beyond_the_end_take_no_part(splits):
    """Without a causal mask nothing else hides them: beside low scores, a score of 0 has an infinite probability."""
    _, options = problem(length=33)
    q, k = torch.full((1, 1, 33, 16), 10.0), torch.full((1, 1, 33, 16), -10.0)
    leaves = [x.requires_grad_() for x in (q, k)]
    loss = attention_kl(*leaves, q.detach(), k.detach() + 1, **options, causal=False)
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(loss, leaves))
    assert splits == [2]


def gradients(tensors, options):
    leaves = [x.detach().requires_grad_() for x in tensors[:2]]
    return torch.autograd.grad(1.7 * attention_kl(*leaves, *tensors[2:], **options), leaves)


@inside
@pytest.mark.parametrize("mask", MASKS[2:4], ids=list)
def test_two_runs_are_equal_and_agree_with_the_two_kernels(mask, splits, monkeypatch):
    tensors, options = problem()
    once, again = (gradients(tensors, options | mask) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(once, again, strict=True))
    monkeypatch.setattr(attention_problem, "FUSED_BACKWARD", False)
    for a, b in zip(once, gradients(tensors, options | mask), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert splits == [2, 2]


@inside
def test_without_memory_for_a_split_the_two_kernels_run(splits, monkeypatch):
    tensors, options = problem(batch=1, length=20)
    monkeypatch.setattr("lightning_itk.kernels.launch.FUSED_BYTES", 4 * tensors[0].numel() - 1)
    check(tensors, options)
    assert splits == [0]


@inside
@pytest.mark.parametrize(("batch", "length"), [(0, 40), (2, 0)])
def test_no_rows_at_all(batch, length):
    leaves = [torch.randn(batch, 2, length, 8, requires_grad=True) for _ in range(4)]
    loss = attention_kl(*leaves, scale_student=1.0, scale_teacher=1.0)
    loss.backward()
    assert leaves[1].grad.shape == leaves[1].shape
