"""KL on logits in the Triton interpreter against fp64 autograd, values and gradients."""

import pytest
import torch
from interpreter import inside, outside, run_in_the_interpreter
from torch import Tensor

pytest.importorskip("triton")
from lightning_itk.kernels.kl import kl_backward, kl_divergence, kl_forward, kl_rows
from lightning_itk.kernels.launch import INTERPRET

pytestmark = pytest.mark.interpret


@outside
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def reference(student: Tensor, teacher: Tensor, kind: str, beta: float, temperature: float) -> Tensor:
    """T² · divergence per row in the inputs' dtype, from materialised distributions."""
    v = min(student.shape[1], teacher.shape[1])
    lq, lp = (student[:, :v] / temperature).log_softmax(-1), (teacher[:, :v] / temperature).log_softmax(-1)
    q, p = lq.exp(), lp.exp()
    if kind == "forward":
        rows = (p * (lp - lq)).sum(-1)
    elif kind == "reverse":
        rows = (q * (lq - lp)).sum(-1)
    else:
        lm = (beta * p + (1 - beta) * q).log()
        rows = beta * (p * (lp - lm)).sum(-1) + (1 - beta) * (q * (lq - lm)).sum(-1)
    return rows * temperature**2


def check(student, teacher, labels=None, *, kind="forward", beta=0.5, temperature=1.0, tolerance=2e-5):  # type: ignore[no-untyped-def]
    """Rows and gradients under a different upstream gradient for every row."""
    kept = torch.ones(len(student), dtype=torch.bool) if labels is None else labels != -100
    upstream = torch.linspace(-1.5, 2.5, len(student))
    exact = student.detach().double().requires_grad_()
    expected = reference(exact, teacher.double(), kind, beta, temperature).masked_fill(~kept, 0.0)
    expected.backward(upstream.double())
    student = student.detach().clone().requires_grad_()
    rows = kl_rows(student, teacher, labels, kind=kind, beta=beta, temperature=temperature)
    rows.backward(upstream)
    torch.testing.assert_close(rows.double(), expected.detach(), rtol=1e-5, atol=5e-6 * temperature**2)
    assert student.grad is not None
    assert exact.grad is not None
    error = (student.grad.double() - exact.grad).norm() / exact.grad.norm().clamp_min(1e-12)
    assert error < tolerance, f"relative gradient error {error:.1e}"
    assert bool((student.grad[~kept] == 0).all())


KINDS = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.3)]


@inside
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_values_and_gradients(kind, beta, temperature):
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(5, 203), 3 * torch.randn(5, 203)
    check(student, teacher, kind=kind, beta=beta, temperature=temperature)


@inside
@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("noise", [0.05, 0.005])
def test_student_close_to_a_sharp_teacher(kind, beta, noise):
    """Logit std 12 and KL of 1e-3 and 1e-5: where accumulators that subtract large numbers lose the signal."""
    torch.manual_seed(1)
    teacher = 12 * torch.randn(6, 190)
    check(teacher + noise * torch.randn(6, 190), teacher, kind=kind, beta=beta, tolerance=1e-3)


@inside
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_at_its_ends_is_zero(beta):
    student, teacher = (5 * torch.randn(3, 70)).requires_grad_(), 5 * torch.randn(3, 70)
    rows = kl_rows(student, teacher, kind="jsd", beta=beta)
    rows.sum().backward()
    torch.testing.assert_close(rows, torch.zeros(3), atol=1e-5, rtol=0)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.zeros(3, 70), atol=1e-5, rtol=0)


@inside
@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_ignored_rows_are_never_read(kind):
    torch.manual_seed(2)
    student, teacher = torch.randn(6, 130), torch.randn(6, 130)
    labels = torch.tensor([3, -100, 0, -100, 129, 5])
    check(student, teacher, labels, kind=kind)
    poisoned = student.masked_fill((labels == -100)[:, None], float("nan")).requires_grad_()
    loss = kl_divergence(poisoned, teacher, labels, kind=kind)
    loss.backward()
    assert poisoned.grad is not None
    assert bool(poisoned.grad.isfinite().all() & loss.isfinite())


@inside
def test_all_rows_ignored():
    student = torch.randn(4, 65, requires_grad=True)
    loss = kl_divergence(student, torch.randn(4, 65), torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


@inside
@pytest.mark.parametrize(("v", "teacher_v"), [(150, 131), (131, 150), (64, 64), (1, 1)])
def test_vocabularies_of_different_size(v, teacher_v):
    torch.manual_seed(3)
    check(torch.randn(4, v), torch.randn(4, teacher_v), kind="forward")
    check(torch.randn(4, v), torch.randn(4, teacher_v), kind="reverse")


@inside
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_tokens_that_neither_model_has(kind):
    torch.manual_seed(4)
    student, teacher = torch.randn(3, 140), torch.randn(3, 140)
    student[:, 70:], teacher[:, 70:] = float("-inf"), float("-inf")  # the second block is empty altogether
    student.requires_grad_()
    rows = kl_rows(student, teacher, kind=kind)
    rows.sum().backward()
    torch.testing.assert_close(rows, reference(student[:, :70].detach(), teacher[:, :70], kind, 0.5, 1.0))
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
    assert not student.grad[:, 70:].any()


@inside
def test_half_precision_and_row_strides():
    torch.manual_seed(5)
    wide = torch.randn(5, 256).half()
    check(wide[:, :131], torch.randn(5, 131).half(), temperature=2.0, tolerance=2e-3)


@inside
def test_in_place_writes_the_gradient_over_the_logits():
    torch.manual_seed(6)
    student, teacher = torch.randn(4, 90), torch.randn(4, 90)
    leaf = student.clone().requires_grad_()
    kl_rows(leaf, teacher, kind="reverse").backward(torch.arange(4.0))
    own = student.clone().requires_grad_()
    logits = own * 1.0
    rows = kl_rows(logits, teacher, kind="reverse", in_place=True)
    rows.backward(torch.arange(4.0), retain_graph=True)
    assert leaf.grad is not None
    assert own.grad is not None
    assert torch.equal(own.grad, leaf.grad)
    assert torch.equal(logits.detach(), leaf.grad)
    with pytest.raises(RuntimeError, match="second backward"):
        rows.backward(torch.arange(4.0))


@inside
def test_registered_operators_and_compile():
    torch.manual_seed(7)
    student, teacher = torch.randn(3, 70, requires_grad=True), torch.randn(3, 70)
    arguments = (student, teacher, torch.tensor([1, -100, 2]), "forward", 0.5, 2.0)
    torch.library.opcheck(kl_forward, arguments)
    torch.library.opcheck(
        kl_backward, (torch.ones(3), student.detach(), *arguments[1:3], torch.zeros(3, 5), "jsd", 0.5, 2.0)
    )
    compiled = torch.compile(
        lambda s: kl_divergence(s, teacher, temperature=2.0) * 3, backend="aot_eager", fullgraph=True
    )
    (grad,) = torch.autograd.grad(compiled(student), student)
    (eager,) = torch.autograd.grad(kl_divergence(student, teacher, temperature=2.0) * 3, student)
    assert torch.equal(grad, eager)


@inside
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sideways"}, "kind must be"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"labels": torch.zeros(2, dtype=torch.int32)}, "labels must be int64"),
        ({"teacher_logits": torch.zeros(3, 9)}, "logits must be"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        kl_rows(**({"student_logits": torch.zeros(2, 9), "teacher_logits": torch.zeros(2, 9)} | change))


@pytest.mark.skipif(
    INTERPRET or torch.cuda.is_available(), reason="needs a process that has neither GPU nor interpreter"
)
def test_without_a_gpu_the_reason_is_one_line():
    with pytest.raises(ValueError, match="need a GPU"):
        kl_divergence(torch.zeros(2, 9), torch.zeros(2, 9))


@inside
def test_labels_of_any_stride():
    torch.manual_seed(5)
    student, teacher = 3 * torch.randn(6, 130), 3 * torch.randn(6, 130)
    table = torch.tensor([[0, 3], [0, -100], [0, 7], [0, -100], [0, 129], [0, 5]])
    check(student, teacher, table[:, 1], kind="forward")


@inside
def test_logits_that_somebody_saved_are_not_overwritten_unseen():
    """exp saves its output; its backward would take the gradient for it."""
    x = torch.randn(4, 70, requires_grad=True)
    rows = kl_rows(x.exp(), torch.randn(4, 70), in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rows.sum().backward()
