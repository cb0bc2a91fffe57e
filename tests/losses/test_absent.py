"""Logits of -inf in the torch losses, against the fp64 limit: values and gradients of every kind, in every corner."""

import pytest
import torch
from absent import ABSENT, limit, logits

from lightning_itk.batch import IGNORE_INDEX
from lightning_itk.losses import Head, cross_entropy, kl_divergence, linear_cross_entropy, linear_kl_parts
from lightning_itk.losses.divergence import divergence_rows

KINDS = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.3)]
PRECISION = {torch.float32: {"rtol": 2e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("case", ABSENT)
def test_divergences_are_the_limit(case, kind, beta, dtype):
    for temperature in (1.0, 2.5):
        student, teacher = logits(case, 3, dtype)
        values, gradients = limit(student, teacher, kind, beta, temperature)
        for row in range(3):
            own = student[row : row + 1].clone().requires_grad_()
            loss = kl_divergence(own, teacher[row : row + 1], kind=kind, beta=beta, temperature=temperature)
            torch.testing.assert_close(loss.double(), values[row], equal_nan=True, **PRECISION[dtype])
            (gradient,) = torch.autograd.grad(loss, own)
            torch.testing.assert_close(gradient.double()[0], gradients[row], equal_nan=True, **PRECISION[dtype])


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("case", ABSENT)
def test_formulas_for_autograd_are_the_limit(case, kind, beta):
    student, teacher = logits(case, 3, torch.float64)
    student.requires_grad_()
    values, gradients = limit(student.detach(), teacher, kind, beta, 2.5)
    rows = divergence_rows(student, teacher, kind, beta, 2.5)
    torch.testing.assert_close(rows.detach(), values, equal_nan=True)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    gradient = gradient.masked_fill(~gradient.isfinite(), torch.nan)  # autograd says inf or nan where there is none
    torch.testing.assert_close(gradient, gradients, equal_nan=True)


@pytest.mark.parametrize("case", ABSENT)
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_at_its_ends_is_zero_whoever_lacks_what(case, beta):
    student, teacher = logits(case)
    student.requires_grad_()
    nothing = torch.full((2, 100), torch.nan if case.endswith(" all") else 0.0)
    loss = kl_divergence(student, teacher, kind="jsd", beta=beta)
    torch.testing.assert_close(loss.detach(), nothing[0, 0], equal_nan=True)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], nothing, equal_nan=True)
    rows = divergence_rows(student, teacher, "jsd", beta)
    torch.testing.assert_close(rows.detach(), nothing[:, 0], equal_nan=True)
    if not case.endswith(" all"):
        assert not torch.autograd.grad(rows.sum(), student)[0].any()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_label_that_the_student_lacks_costs_inf_everywhere(temperature):
    """Two rows: the lowest finite number would do for one, and overflow for two."""
    student, teacher = logits("both")
    head = Head(torch.eye(100), torch.where(student[0] == -torch.inf, student[0], 0.0))
    hidden = student.clamp_min(-50.0).requires_grad_()
    labels = torch.tensor([2, IGNORE_INDEX])
    parts = linear_kl_parts(
        hidden, head, teacher.clamp_min(-50.0), head, labels, temperature=temperature, ce_weight=0.5
    )
    losses = [parts.loss, cross_entropy(student, labels), linear_cross_entropy(hidden, head, labels)]
    assert all(loss == torch.inf for loss in [*losses, parts.ce])
    assert parts.kl.isfinite()
    assert all(torch.autograd.grad(loss, hidden)[0].isfinite().all() for loss in (losses[0], losses[2]))


def test_a_part_of_weight_0_cannot_make_the_loss_nan():
    student, teacher = logits("student", 1)
    head = Head(torch.eye(100), torch.where(student[0] == -torch.inf, student[0], 0.0))
    how = {"ce_weight": 1.0, "kl_weight": 0.0}
    parts = linear_kl_parts(student.clamp_min(-50.0), head, teacher, Head(torch.eye(100)), torch.tensor([5]), **how)
    assert parts.kl == torch.inf
    assert parts.loss == parts.ce < torch.inf
    parts = linear_kl_parts(student.clamp_min(-50.0), head, student.clamp_min(-50.0), head, torch.tensor([2]))
    assert parts.ce == torch.inf
    assert parts.loss == parts.kl < 1e-6
