"""The divergence from a teacher's top k and their tail, against probabilities in fp64 and autograd."""

import pytest
import torch

from lightning_itk.losses.chunked import CHUNK_ELEMENTS, Head, linear_token_scores
from lightning_itk.losses.divergence import Divergence
from lightning_itk.losses.token import linear_kl_parts
from lightning_itk.losses.topk import top_k, topk_gap, topk_kl_parts

KINDS = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.3)]
N, V, H = 19, 37, 12


def problem(vocab: int = V, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = [torch.randn(N, H, dtype=dtype, requires_grad=i == 0) for i in range(2)]
    heads = [torch.randn(size, H, dtype=dtype, requires_grad=i == 0) for i, size in enumerate((vocab, V))]
    return hidden[0], Head(heads[0]), hidden[1], Head(heads[1], torch.randn(V, dtype=dtype)), torch.randint(vocab, (N,))


def oracle(student, head, teacher, teacher_head, targets, k: int, how: Divergence):
    """T² times the divergence of the k likeliest tokens and the rest as one, and CE, from probabilities."""
    z, zt = student @ head.weight.T, teacher @ teacher_head.weight.T + teacher_head.bias
    q, p = (logits.div(how.temperature).softmax(-1) for logits in (z, zt))
    ids = p.topk(k).indices

    def outcomes(x):
        named = x.gather(1, ids)
        return torch.cat([named, x.scatter(1, ids, 0.0).sum(1, keepdim=True)], 1)

    q, p = outcomes(q), outcomes(p)
    m = how.beta * p + (1 - how.beta) * q
    kl = {
        "forward": p * (p / q).log(),
        "reverse": q * (q / p).log(),
        "jsd": how.beta * p * (p / m).log() + (1 - how.beta) * q * (q / m).log(),
    }[how.kind].sum()
    ce = -z.log_softmax(-1).gather(1, targets[:, None]).sum()
    return how.ce_weight * ce + how.kl_weight * how.temperature**2 * kl


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize(("temperature", "k", "ce_weight"), [(1.0, 1, 0.0), (2.0, 5, 0.7), (0.7, V - 1, 0.2)])
def test_value_and_gradients(kind, beta, temperature, k, ce_weight, monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", V * 7)
    student, head, teacher, teacher_head, targets = problem()
    how = Divergence(kind, beta, temperature, ce_weight, 1.3)
    stored = top_k(teacher, teacher_head, targets, k, temperature)
    assert stored.scores(targets).top1.equal(linear_token_scores(teacher, teacher_head, targets).top1)
    torch.testing.assert_close(stored.nll, linear_token_scores(teacher, teacher_head, targets).nll)
    parts = topk_kl_parts(student, head, stored, targets, how)
    inputs = (student, head.weight)
    found = torch.autograd.grad(1.7 * parts.loss, inputs)
    expected_loss = oracle(student, head, teacher, teacher_head, targets, k, how)
    expected = torch.autograd.grad(1.7 * expected_loss, inputs)
    torch.testing.assert_close(parts.loss, expected_loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    if k == V - 1:  # every outcome is one token
        whole = linear_kl_parts(student, head, teacher, teacher_head, targets, how, impl="torch")
        torch.testing.assert_close(tuple(parts), tuple(whole), rtol=1e-9, atol=1e-9)


def test_tokens_that_only_one_of_them_has():
    """A teacher's padding is left out of its top k, a student's counts for nothing: as in `linear_kl_divergence`."""
    for vocab, k in ((V + 5, V - 1), (V - 6, V - 2)):
        student, head, teacher, teacher_head, targets = problem(vocab)
        targets = targets.clamp_max(V - 7)
        if vocab < V:  # likely enough to be among the k, one by one
            teacher_head.bias[vocab:] += 3
            teacher_head.bias[:2] -= 30
        stored = top_k(teacher, teacher_head, targets, k)
        parts = topk_kl_parts(student, head, stored, targets, Divergence())
        whole = linear_kl_parts(student, head, teacher, teacher_head, targets, Divergence(), impl="torch")
        torch.testing.assert_close(parts.kl, whole.kl)


def test_no_rows_and_what_cannot_be():
    student, head, teacher, teacher_head, targets = problem()
    none = top_k(teacher[:0], teacher_head, targets[:0], 3)
    parts = topk_kl_parts(student[:0], head, none, targets[:0], Divergence())
    parts.loss.backward()
    assert parts.loss == 0
    for k in (0, V):
        with pytest.raises(ValueError, match=f"k is {k}, expected 1 to {V - 1}"):
            top_k(teacher, teacher_head, targets, k)
    stored = top_k(teacher, teacher_head, targets, 3)
    with pytest.raises(ValueError, match="those of temperature 1, the loss has temperature 2"):
        topk_kl_parts(student, head, stored, targets, Divergence(temperature=2.0))


def test_the_gap_is_measured_and_shrinks():
    student, head, teacher, teacher_head, targets = problem()
    how, gaps = Divergence(ce_weight=0.5, kl_weight=0.5), []
    for k in (2, 8, V - 1):
        stored = top_k(teacher, teacher_head, targets, k)
        gaps.append(topk_gap(student, head, teacher, teacher_head, stored, targets, how))
    assert gaps[0].exact == pytest.approx(gaps[2].exact)
    assert gaps[0].stored < gaps[1].stored < gaps[2].stored == pytest.approx(gaps[2].exact)  # outcomes are merged
    assert gaps[0].token_gradient > gaps[1].token_gradient > gaps[2].token_gradient
    assert gaps[2].token_gradient == pytest.approx(0, abs=1e-9)
    assert gaps[0].summed_gradient > gaps[2].summed_gradient
