"""How the linear kernels walk their tokens: chunks and their bound, dropped rows, and which engine evaluates."""

import itertools

import pytest
import torch
from interpreter import inside, outside, run_in_the_interpreter

pytest.importorskip("triton")
from lightning_itk import losses
from lightning_itk.kernels import linear_chunks, linear_eval
from lightning_itk.kernels.chunks import plan_chunks
from lightning_itk.kernels.gemm import matmul
from lightning_itk.kernels.linear_kl import linear_kl_divergence

pytestmark = pytest.mark.interpret


@outside
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def models(n=9, v=75):
    """The student's hidden states [n, 24] and head [v, 24], the teacher's [n, 40] and [v, 40]."""
    g = torch.Generator().manual_seed(n)
    return [torch.randn(s, generator=g) / s[1] ** 0.5 for s in ((n, 24), (v, 24), (n, 40), (v, 40))]


def test_chunks_of_the_worked_example():
    """The numbers in the docstring of ChunkPlan."""
    sizes = {"n": 8192, "v": 128_256, "itemsize": 2, "teacher": True, "max_scratch_bytes": 2 << 30}

    def chunks(**head) -> tuple[list[list[int]], int]:  # type: ignore[no-untyped-def]
        rows, columns, kept = plan_chunks(**sizes, **head)
        assert columns == 128_256
        groups = [min(kept, 8192 - first) for first in range(0, 8192, kept)]
        return [[min(rows, group - start) for start in range(0, group, rows)] for group in groups], kept

    assert chunks(width=4096, trains_head=True) == ([[2048] * 4], 8192)
    assert chunks(width=2048, trains_head=True) == ([[1024] * 4] * 2, 4096)
    for width in (2048, 4096):
        assert chunks(width=width, trains_head=False) == ([[1664]] * 4 + [[1536]], 1664)
    assert chunks(width=2048, trains_head=False, gradients=False)[0] == [[2048]] * 4


@pytest.mark.parametrize("scratch", [1, 1 << 20, 600 << 20, 2 << 30])
@pytest.mark.parametrize("n", [1, 128, 1000, 5000, 8192])
def test_chunks_fit_their_bound(n, scratch):
    for v, width, itemsize, teacher, trains, gradients in itertools.product(
        (10, 50257, 151_936), (8, 896, 4096), (2, 4), (False, True), (False, True), (False, True)
    ):
        trains = trains and gradients
        options = {"teacher": teacher, "trains_head": trains, "max_scratch_bytes": scratch, "gradients": gradients}
        rows, columns, kept = plan_chunks(n, v, width, itemsize, **options)
        assert columns % 16 == 0
        assert v <= columns < v + 16
        assert 0 < rows <= kept <= n
        assert rows == kept or rows % 128 == 0
        assert kept == n or kept % 128 == 0
        assert trains or kept == rows
        dlogits = kept * columns * itemsize if gradients else 0
        if trains and kept == n and dlogits <= v * width * 4:
            dlogits = 0  # on top, in place of the accumulator
        if kept > 128:
            assert dlogits <= max(scratch // 2, 0 if trains else scratch)
        if rows > 128:
            assert rows * columns * (8 if teacher else 4) + dlogits <= scratch


@inside
def test_the_public_bound_arrives(monkeypatch):
    """700 rows of 80 fp32 logits and dlogits: chunks of 128 instead of one."""
    h, rows = models(n=700, v=80), []
    for x in h[:2]:
        x.requires_grad_()
    monkeypatch.setattr(linear_chunks, "matmul", lambda a, *rest, **how: rows.append(len(a)) or matmul(a, *rest, **how))
    labels = torch.randint(0, 80, (700,))
    calls = (
        lambda **how: losses.linear_kl_divergence(*h, labels, ce_weight=0.5, impl="triton", **how),
        lambda **how: losses.linear_cross_entropy(*h[:2], labels, impl="triton", **how),
    )
    for call in calls:
        for bound, most in ((None, 700), (1, 128)):
            rows.clear()
            call(max_scratch_bytes=bound)
            assert rows[0] == most


@inside
def test_ignored_rows_cost_no_product(monkeypatch):
    h, labels = models(n=6), torch.tensor([-100, 3, -100, -100, 74, -100])
    leaves, results, rows = [x.requires_grad_() for x in h[:2]], [], []
    monkeypatch.setattr(linear_chunks, "matmul", lambda a, *rest, **how: rows.append(len(a)) or matmul(a, *rest, **how))
    for drop in (False, True):
        rows.clear()
        loss, ce, kl = linear_kl_divergence(*h, labels, ce_weight=0.5, drop_ignored=drop)
        assert rows[0] == (2 if drop else 6)
        results.append([loss, ce, kl, *torch.autograd.grad(2 * loss, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def on_a(arch, monkeypatch, kind, n, width, v=128_256, dtype=torch.bfloat16):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(linear_eval, "architecture", lambda device: arch)
    model = (torch.empty(n, width, dtype=dtype, device="meta"), torch.empty(v, width, dtype=dtype, device="meta"), None)
    return linear_eval.fused_is_faster(model, None if kind == "none" else model, v=v, kind=kind)


def test_evaluation_takes_the_fused_head_where_logits_are_the_larger_part(monkeypatch):
    """The figures in README.md: the largest H of both models, in steps of 32, that the fused head is chosen for."""
    largest = {
        (kind, n): max((w for w in range(32, 8192, 32) if on_a("sm_90", monkeypatch, kind, n, w)), default=0)
        for kind in ("forward", "jsd", "none")
        for n in (128, 8192)
    }
    assert largest == {
        ("forward", 128): 640,
        ("forward", 8192): 480,
        ("jsd", 128): 96,
        ("jsd", 8192): 96,
        ("none", 128): 288,
        ("none", 8192): 256,
    }
    assert on_a("sm_90", monkeypatch, "forward", 8192, 4096, dtype=torch.float32)
    assert not on_a("gfx942", monkeypatch, "forward", 8192, 4096, dtype=torch.float32)
