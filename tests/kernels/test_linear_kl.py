"""Linear KL and cross-entropy in the Triton interpreter against fp64 autograd on materialised logits."""

from typing import NamedTuple
from unittest import mock

import pytest
import torch
from interpreter import inside, outside, run_in_the_interpreter
from torch import Tensor

pytest.importorskip("triton")
from lightning_itk.kernels import linear_kl
from lightning_itk.kernels.chunks import plan_chunks
from lightning_itk.kernels.linear_chunks import scaled
from lightning_itk.kernels.linear_kl import linear_cross_entropy, linear_kl_divergence

pytestmark = pytest.mark.interpret


@outside
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


class Heads(NamedTuple):
    student_hidden: Tensor  # [N, Hs]
    student_weight: Tensor  # [V, Hs]
    teacher_hidden: Tensor  # [N, Ht]
    teacher_weight: Tensor  # [Vt, Ht]


def heads(n=9, v=75, teacher_v=75, width=24, teacher_width=40, std=1.0, dtype=torch.float32, seed=0) -> Heads:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    shapes = ((n, width), (v, width), (n, teacher_width), (teacher_v, teacher_width))
    factors = (1.0, std / width**0.5, 1.0, std / teacher_width**0.5)
    return Heads(*((f * torch.randn(s)).to(dtype) for f, s in zip(factors, shapes, strict=True)))


def reference(  # type: ignore[no-untyped-def]
    h: Heads, labels, *, student_bias=None, teacher_bias=None, student_scale=1.0, teacher_scale=1.0,
    student_softcap=None, teacher_softcap=None, kind="forward", beta=0.5, temperature=1.0, ce_weight=0.0, kl_weight=1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    v = min(len(h.student_weight), len(h.teacher_weight))

    def logits(hidden, weight, bias, scale, cap):  # type: ignore[no-untyped-def]
        z = scale * (hidden @ weight[:v].T + (0 if bias is None else bias[:v]))
        return z if cap is None else cap * torch.tanh(z / cap)

    z_s = logits(h.student_hidden, h.student_weight, student_bias, student_scale, student_softcap)
    z_t = logits(h.teacher_hidden, h.teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
    lq, lp = (z_s / temperature).log_softmax(-1), (z_t / temperature).log_softmax(-1)
    q, p = lq.exp(), lp.exp()
    if kind == "forward":
        rows = (p * (lp - lq)).sum(-1)
    elif kind == "reverse":
        rows = (q * (lq - lp)).sum(-1)
    else:
        lm = (beta * p + (1 - beta) * q).log()
        rows = beta * (p * (lp - lm)).sum(-1) + (1 - beta) * (q * (lq - lm)).sum(-1)
    kl = temperature**2 * (rows if labels is None else rows[labels != -100]).sum()
    ce = kl.new_zeros(())
    if labels is not None:
        ce = torch.nn.functional.cross_entropy(z_s, labels, reduction="sum")
    return (ce_weight * ce if ce_weight else 0) + kl_weight * kl, ce, kl


def check(h: Heads, labels=None, *, tolerance=2e-5, scratch=2 << 30, upstream=1.7, biases=False, **options):  # type: ignore[no-untyped-def]
    """Values of training and of both engines of evaluation; gradients under an upstream gradient that is not 1."""
    bias = (torch.randn(len(h.student_weight)), torch.randn(len(h.teacher_weight))) if biases else (None, None)
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in (h[0], h[1], bias[0])]
    exact = [x if x is None else x.detach().double().requires_grad_() for x in leaves]
    precise = Heads(exact[0], exact[1], h.teacher_hidden.double(), h.teacher_weight.double())
    teacher_bias = None if bias[1] is None else bias[1].double()
    expected = reference(precise, labels, student_bias=exact[2], teacher_bias=teacher_bias, **options)
    (expected[0] * upstream).backward()
    keywords = options | {"student_bias": leaves[2], "teacher_bias": bias[1], "max_scratch_bytes": scratch}
    found = linear_kl_divergence(leaves[0], leaves[1], *h[2:], labels, **keywords)
    evaluated = []
    for fused in (True, False):
        with torch.no_grad(), mock.patch.object(linear_kl, "fused_is_faster", lambda *_, fused=fused, **how: fused):
            evaluated.append(linear_kl_divergence(leaves[0], leaves[1], *h[2:], labels, **keywords))
    for *values, c in zip(found, *evaluated, expected, strict=True):
        for value in values:
            torch.testing.assert_close(value.double(), c.detach(), rtol=1e-4, atol=1e-5)
    assert found[0].requires_grad
    assert not found[1].requires_grad
    assert not found[2].requires_grad
    (found[0] * upstream).backward()
    for name, a, b in zip(("hidden", "weight", "bias"), leaves, exact, strict=True):
        if a is not None:
            error = (a.grad.double() - b.grad).norm() / b.grad.norm().clamp_min(1e-12)
            assert error < tolerance, f"relative error {error:.1e} of the {name} gradient"
    return leaves


LABELS = torch.tensor([3, -100, 0, 74, -100, -100, 8, 20, -100])


@inside
@pytest.mark.parametrize(
    ("kind", "beta", "temperature"),
    [("forward", 0.5, 1.0), ("forward", 0.5, 2.5), ("reverse", 0.5, 2.5), ("jsd", 0.3, 2.5)],
)
def test_kl_and_cross_entropy_together(kind, beta, temperature):
    check(heads(), LABELS, kind=kind, beta=beta, temperature=temperature, ce_weight=0.7, kl_weight=1.3)


@inside
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_bias_scale_and_softcap(kind):
    options = {"student_scale": 0.8, "teacher_scale": 1.2, "student_softcap": 4.0, "teacher_softcap": 5.0}
    check(heads(std=3.0), LABELS, kind=kind, biases=True, ce_weight=0.5, **options)


@inside
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_student_close_to_a_sharp_teacher(kind):
    torch.manual_seed(8)
    h = heads(teacher_width=24, std=12.0)
    hidden, weight = (x + 0.004 * torch.randn_like(x) for x in h[2:])
    check(Heads(hidden, weight, *h[2:]), kind=kind, tolerance=1e-3)


@inside
@pytest.mark.parametrize(("v", "teacher_v"), [(80, 66), (66, 80)])
def test_vocabularies_of_different_size(v, teacher_v):
    leaves = check(heads(n=4, v=v, teacher_v=teacher_v), torch.tensor([0, 65, -100, 7]), biases=True, ce_weight=0.5)
    assert not leaves[1].grad[66:].any()
    assert not leaves[2].grad[66:].any()


@inside
def test_chunks_accumulate_the_weight_gradient():
    """700 rows in groups of 384 and 316, these in chunks of 128, under a budget too small to keep all dlogits."""
    labels = torch.randint(0, 40, (700,))
    labels[::2] = -100
    scratch = 2 * 384 * 48 * 4  # 48 columns of fp32 dlogits for 384 rows in one half
    plan = plan_chunks(700, 40, 8, 4, teacher=True, trains_head=True, max_scratch_bytes=scratch)
    assert plan == (128, 48, 384)
    check(
        heads(n=700, v=40, teacher_v=40, width=8, teacher_width=8), labels, scratch=scratch, ce_weight=0.5, biases=True
    )


@inside
def test_all_rows_ignored():
    h = heads(n=3)
    hidden, weight = h[0].requires_grad_(), h[1].requires_grad_()
    for training in (True, False):
        with torch.set_grad_enabled(training):
            sums = linear_kl_divergence(hidden, weight, *h[2:], torch.full((3,), -100), ce_weight=1.0)
        assert [x.item() for x in sums] == [0, 0, 0]
        if training:
            sums[0].backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_rows(dtype):
    """Callers drop ignored rows first, so a batch without responses arrives as zero rows."""
    h, labels = heads(n=0, dtype=dtype), torch.zeros(0, dtype=torch.int64)
    leaves = [x.clone().requires_grad_() for x in (*h[:2], torch.zeros(75, dtype=dtype))]
    bias = leaves[2]
    for loss in (
        linear_kl_divergence(*leaves[:2], *h[2:], labels, student_bias=bias, ce_weight=0.5)[0],
        linear_kl_divergence(*leaves[:2], *h[2:], student_bias=bias, kind="jsd", max_scratch_bytes=1)[0],
        linear_cross_entropy(*leaves[:2], labels, bias=bias),
    ):
        gradients = torch.autograd.grad(loss * 2, leaves)
        assert loss.item() == 0
        assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(gradients, leaves, strict=True))


@inside
@pytest.mark.parametrize("trained", [0, 1])
def test_only_what_trains_gets_a_gradient(trained):
    h = heads(n=4)
    leaves = [x.clone().requires_grad_(i == trained) for i, x in enumerate(h[:2])]
    both = [x.clone().requires_grad_() for x in h[:2]]
    (linear_kl_divergence(*leaves, *h[2:])[0] * 3).backward()
    (linear_kl_divergence(*both, *h[2:])[0] * 3).backward()
    assert leaves[1 - trained].grad is None
    torch.testing.assert_close(leaves[trained].grad, both[trained].grad)


@inside
def test_linear_cross_entropy():
    h = heads()
    leaves = [x.clone().requires_grad_() for x in (*h[:2], torch.randn(75))]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    loss = linear_cross_entropy(*leaves[:2], LABELS, bias=leaves[2], scale=0.5, softcap=6.0)
    z = 0.5 * (exact[0] @ exact[1].T + exact[2])
    expected = torch.nn.functional.cross_entropy(6 * torch.tanh(z / 6), LABELS, reduction="sum")
    (loss * 0.3).backward()
    (expected * 0.3).backward()
    torch.testing.assert_close(loss.double(), expected.detach())
    for a, b in zip(leaves, exact, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        evaluated = linear_cross_entropy(*leaves[:2], LABELS, bias=leaves[2], scale=0.5, softcap=6.0)
        torch.testing.assert_close(evaluated.double(), expected.detach())
        assert linear_cross_entropy(h[0][:1], h[1], torch.tensor([75])).item() == float("inf")
    assert linear_cross_entropy(h[0][:1].requires_grad_(), h[1], torch.tensor([75])).item() == float("inf")


@inside
def test_fp16_keeps_small_gradients():
    """Near convergence most dlogits are below fp16's smallest number unless they are stored in larger units."""
    h = heads(teacher_width=24, std=6.0, dtype=torch.float16)
    hidden = (h[2].float() + 0.01 * torch.randn(9, 24)).half()
    check(Heads(hidden, h[3], *h[2:]), kl_weight=1e-3, tolerance=3e-3)


@inside
def test_autocast_multiplies_in_its_dtype():
    h = heads(n=4)
    half = Heads(*(x.half().float() for x in h))
    hidden, weight = (x.clone().requires_grad_() for x in half[:2])
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_kl_divergence(hidden, weight, *half[2:])[0]
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference(Heads(*(x.double() for x in half)), None)[0], rtol=1e-4, atol=0)


@inside
def test_second_backward_is_an_error():
    h = heads(n=2)
    loss = linear_kl_divergence(h[0].requires_grad_(), *h[1:])[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@inside
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "none"}, "kind must be"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"ce_weight": 1.0}, "ce_weight needs labels"),
        ({"teacher_hidden": torch.zeros(3, 4)}, "same rows"),
        ({"student_weight": torch.zeros(8, 5)}, "student hidden and weight must be"),
        ({"teacher_weight": torch.zeros(8, 4).half()}, "expected one dtype"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels must be int64"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {"student_hidden": torch.zeros(2, 4), "student_weight": torch.zeros(8, 4)}
    good |= {"teacher_hidden": torch.zeros(2, 4), "teacher_weight": torch.zeros(8, 4)}
    with pytest.raises(ValueError, match=message):
        linear_kl_divergence(**(good | change))


@inside
@pytest.mark.parametrize("training", [True, False])
def test_labels_and_biases_of_any_stride(training):
    h = heads(n=6)
    table = torch.tensor([[0, 3], [0, -100], [0, 7], [0, -100], [0, 70], [0, 5]])
    biases = torch.randn(2, 75, 2)
    results = []
    for strided in (True, False):
        labels, *bias = table[:, 1], biases[0, :, 0], biases[1, :, 1]
        if not strided:
            labels, bias = labels.contiguous(), [b.contiguous() for b in bias]
        tensors = [x.clone().requires_grad_(training) for x in h[:2]]
        options = {"student_bias": bias[0], "teacher_bias": bias[1], "ce_weight": 0.5}
        loss, ce, kl = linear_kl_divergence(*tensors, *h[2:], labels, **options)
        entropy = linear_cross_entropy(*tensors, labels, bias=bias[0])
        grads = torch.autograd.grad(1.7 * loss + entropy, tensors) if training else []
        results.append([loss, ce, kl, entropy, *grads])
    for strided, contiguous in zip(*results, strict=True):
        assert strided.equal(contiguous)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_upstream_gradients_are_rounded_once(dtype):
    grad, factor = torch.randn(70, 33).to(dtype), torch.tensor(1 / 3)
    expected = (grad.float() * factor).to(dtype)
    assert scaled(grad, factor).equal(expected)
