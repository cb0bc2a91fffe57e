"""Where fp32, -inf and dtypes are hard, in the Triton interpreter: against the torch path, the limit and plain fp32."""

from collections.abc import Callable

import pytest
import torch
from absent import ABSENT, limit, logits
from interpreter import inside, outside, run_in_the_interpreter
from torch import Tensor

pytest.importorskip("triton")
from lightning_itk.kernels.attention import attention_kl
from lightning_itk.kernels.kl import kl_rows
from lightning_itk.kernels.linear_kl import linear_kl_divergence
from lightning_itk.losses import Head, linear_kl_parts
from lightning_itk.losses.divergence import divergence_rows

pytestmark = pytest.mark.interpret


@outside
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


KINDS = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.3)]


@inside
@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("case", ABSENT)
def test_absent_tokens_on_logits(case, kind, beta):
    """The rows of the limit, which `tests/losses/test_absent.py` asks of the torch path too."""
    student, teacher = logits(case)
    student.requires_grad_()
    values, gradients = limit(student.detach(), teacher, kind, beta, 2.5)
    rows = kl_rows(student, teacher, kind=kind, beta=beta, temperature=2.5)
    torch.testing.assert_close(rows.detach().double(), values, rtol=1e-5, atol=1e-5, equal_nan=True)
    (found,) = torch.autograd.grad(rows, student, torch.ones(2))
    torch.testing.assert_close(found.double(), gradients, rtol=1e-5, atol=1e-5, equal_nan=True)


@inside
@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("case", ABSENT)
def test_absent_tokens_in_a_head(case, kind, beta):
    """A bias of -inf takes a token away; a label that the student lacks is one of the corners."""
    pair, width = [x[:1] for x in logits(case)], 8
    g = torch.Generator().manual_seed(1)
    biases = [torch.where(x[0] == -torch.inf, x[0], 0.0) for x in pair]
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(shape, generator=g) for shape in ((3, width), (100, width)) * 2
    )
    labels = torch.tensor([2, -100, 50])
    how = {"kind": kind, "beta": beta, "temperature": 2.5, "ce_weight": 0.5, "kl_weight": 1.5}
    results = []
    for triton in (True, False):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, biases[0])]
        if triton:
            teacher = (teacher_hidden, teacher_weight, labels)
            keywords = how | {"student_bias": leaves[2], "teacher_bias": biases[1]}
            parts = linear_kl_divergence(*leaves[:2], *teacher, **keywords)
            with torch.no_grad():
                evaluated = linear_kl_divergence(*leaves[:2], *teacher, **keywords)
        else:
            heads = Head(*leaves[1:]), Head(teacher_weight, biases[1])
            parts = linear_kl_parts(leaves[0], heads[0], teacher_hidden, heads[1], labels, **how)
            evaluated = parts
        gradients = torch.autograd.grad(parts[0], leaves)
        results.append([x.detach() for x in (*parts, *evaluated, *gradients)])
    for name, ours, torchs in zip(("loss", "ce", "kl") * 2 + ("hidden", "weight", "bias"), *results, strict=True):
        torch.testing.assert_close(
            ours, torchs, rtol=2e-5, atol=2e-5, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


@inside
def test_a_part_of_weight_0_cannot_make_the_loss_nan():
    student, teacher = logits("student", 1)
    bias = torch.where(student[0] == -torch.inf, student[0], 0.0)
    heads = (torch.randn(1, 8), torch.randn(100, 8), torch.randn(1, 8), torch.randn(100, 8), torch.tensor([5]))
    for hidden in (heads[0], heads[0].clone().requires_grad_()):
        loss, ce, kl = linear_kl_divergence(hidden, *heads[1:], student_bias=bias, ce_weight=1.0, kl_weight=0.0)
        assert kl == torch.inf
        assert loss.detach() == ce < torch.inf


def errors(function: Callable[..., Tensor], leaves: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative errors of a function's values and of its gradients by the leaves."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    found = function(*leaves)
    found = [found.detach(), *torch.autograd.grad(found.sum(), leaves)]
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def assert_as_good_as_plain(kernel, plain, leaves: list[Tensor], names: str) -> None:  # type: ignore[no-untyped-def]
    """No more than twice the error that plain fp32 makes in the values and in each gradient; fp64 is the truth."""
    precise = [x.double().requires_grad_() for x in leaves]
    exact = plain(*precise)
    exact = [exact.detach(), *torch.autograd.grad(exact.sum(), precise)]
    for name, ours, theirs in zip(
        names.split(), errors(kernel, leaves, exact), errors(plain, leaves, exact), strict=True
    ):
        assert ours < 2 * theirs + 2e-7, f"{name}: relative error {ours:.1e}, in plain fp32 {theirs:.1e}"


@inside
@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize(
    ("std", "mean", "noise", "temperature"), [(12.0, 0.0, 0.05, 1.0), (12.0, 30.0, 0.3, 2.5), (40.0, -30.0, 0.05, 1.0)]
)
def test_logits_round_no_worse_than_plain_fp32(kind, beta, std, mean, noise, temperature):
    """A student close to a sharp teacher: what is rounded at the size of the largest logit shows."""
    torch.manual_seed(1)
    teacher = mean + std * torch.randn(16, 130)
    student = teacher + noise * torch.randn(16, 130)

    def kernel(z: Tensor) -> Tensor:
        return kl_rows(z, teacher, kind=kind, beta=beta, temperature=temperature)

    def plain(z: Tensor) -> Tensor:
        return divergence_rows(z, teacher.to(z.dtype), kind, beta, temperature)

    assert_as_good_as_plain(kernel, plain, [student], "value gradient")


@inside
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_linear_losses_round_no_worse_than_plain_fp32(kind, beta):
    """Row by row, as errors cancel in a sum; labels are the likeliest tokens, whose cross-entropy is small."""
    torch.manual_seed(2)
    teacher_hidden, weight = 12 * torch.randn(8, 16), torch.randn(70, 16) / 4
    hidden = teacher_hidden + 0.05 * torch.randn(8, 16)
    bias = torch.full((70,), 40.0)
    labels = (hidden @ weight.T).argmax(-1)

    def kernel(part: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda h, w: torch.stack(
            [
                linear_kl_divergence(
                    h[i], w, teacher_hidden[i], weight, labels[i], student_bias=bias, teacher_bias=bias,
                    kind=kind, beta=beta, temperature=1.0 if part == 2 else 2.5, ce_weight=float(part == 1),
                    kl_weight=float(part == 2),
                )[0 if torch.is_grad_enabled() else part]
                for i in torch.arange(8).split(1)
            ]
        )  # fmt: skip

    def cross_entropy(h: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(h @ w.T + bias.to(h.dtype), labels, reduction="none")

    def divergence(h: Tensor, w: Tensor) -> Tensor:
        teacher = teacher_hidden.to(h.dtype) @ weight.to(h.dtype).T + bias.to(h.dtype)
        return divergence_rows(h @ w.T + bias.to(h.dtype), teacher, kind, beta)

    for part, plain in ((1, cross_entropy), (2, divergence)):
        assert_as_good_as_plain(kernel(part), plain, [hidden, weight], "value hidden weight")
        with torch.no_grad():
            exact = plain(hidden.double(), weight.double())
            ours, theirs = (float((f(hidden, weight).double() - exact).norm()) for f in (kernel(part), plain))
        assert ours < 2 * theirs


def pair_of_models(dtypes, autocast=False):
    """Value and gradients by the student's q and k, of fp16 numbers held in one dtype per model."""
    torch.manual_seed(0)
    heads = [torch.randn(1, count, 40, 16).half() for count in (2, 1, 2, 1)]
    heads = [x.to(dtypes[n // 2]).requires_grad_(n < 2) for n, x in enumerate(heads)]
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        value = attention_kl(*heads, scale_student=0.4, scale_teacher=0.4)
    value.backward()
    return [value.detach(), heads[0].grad, heads[1].grad]


HALF, SINGLE = torch.float16, torch.float32
PAIRS = [(SINGLE, SINGLE), (SINGLE, HALF), (HALF, SINGLE)]


@inside
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_attention_kernels_under_autocast_run_in_its_dtype(dtypes):
    found, expected = pair_of_models(dtypes, autocast=True), pair_of_models((HALF, HALF))
    assert found[1].dtype == found[2].dtype == dtypes[0]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.half(), b.half())


@inside
@pytest.mark.parametrize("dtypes", PAIRS[1:], ids=str)
def test_attention_kernels_cast_the_narrower_model_up(dtypes):
    found, expected = pair_of_models(dtypes), pair_of_models((SINGLE, SINGLE))
    assert found[1].dtype == found[2].dtype == dtypes[0]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b.to(a.dtype))


@inside
def test_attention_kernels_take_no_fp64():
    with pytest.raises(ValueError, match="expected one dtype of at most fp32"):
        pair_of_models((torch.float64, torch.float64))
