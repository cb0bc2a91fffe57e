"""Triton losses as operators, in the interpreter: opcheck, and one graph with the values and gradients of eager."""

import pytest
import torch
from interpreter import inside, outside, run_in_the_interpreter

pytest.importorskip("triton")
from lightning_itk import attention, losses
from lightning_itk.kernels.attention import attention_backward, attention_kl, attention_loss
from lightning_itk.kernels.linear_kl import linear_kl_divergence, linear_loss

pytestmark = pytest.mark.interpret


@outside
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


LENGTHS = (3, 5, 6)  # the second makes lengths dynamic


def models(n=9, v=75):
    """The student's hidden states [n, 24] and head [v, 24], the teacher's [n, 40] and [v, 40]."""
    g = torch.Generator().manual_seed(n)
    return [torch.randn(s, generator=g) / s[1] ** 0.5 for s in ((n, 24), (v, 24), (n, 40), (v, 40))]


def maps(length, heads):
    """q and k of both models, [1, heads, length, 16]."""
    g = torch.Generator().manual_seed(length)
    return [torch.randn(1, heads, length, 16, generator=g) for _ in range(4)]


@inside
def test_the_linear_operator_passes_opcheck_and_compiles():
    h = models(n=3)
    hidden, weight = (x.clone().requires_grad_() for x in h[:2])
    numbers = (1.0, 1.0, None, None, 0.5, 2.0, 0.5, 1.0)
    for wanted in ((True, True, False), (True, False, False), (False, False, False)):
        leaves = [x if want else x.detach() for x, want in zip((hidden, weight), wanted, strict=False)]
        arguments = (*leaves, None, *h[2:], None, torch.tensor([1, -100, 2]), "forward", *numbers, *wanted)
        torch.library.opcheck(linear_loss, (*arguments, True, 1 << 20))
    compiled = torch.compile(
        lambda a, b: 2 * linear_kl_divergence(a, b, *h[2:], temperature=2.0)[0], backend="aot_eager", fullgraph=True
    )
    found = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    eager = torch.autograd.grad(2 * linear_kl_divergence(hidden, weight, *h[2:], temperature=2.0)[0], (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


@inside
@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_linear_losses_are_one_graph(loss):
    """Ignored rows are dropped inside the operator; the second length makes lengths dynamic."""

    def call(hidden, weight, teacher_hidden, teacher_weight, labels):  # type: ignore[no-untyped-def]
        with torch.autocast("cpu", dtype=torch.float16):
            if loss == "ce":
                return 3 * losses.linear_cross_entropy(hidden, weight, labels, impl="triton")
            models = hidden * 1.5, weight, teacher_hidden, teacher_weight
            return 3 * losses.linear_kl_divergence(*models, labels, kind="jsd", ce_weight=0.3, impl="triton")

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for n in LENGTHS:
        h, labels = models(n=n), torch.tensor([4, -100, 0, 74, -100, 2])[:n]
        leaves = [x.requires_grad_() for x in h[:2]]
        expected, found = call(*h, labels), compiled(*h, labels)
        assert found.equal(expected)
        for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (found, expected)), strict=True):
            torch.testing.assert_close(a, b)


@inside
def test_the_attention_operators_pass_opcheck_and_compile():
    tensors, options = maps(20, 1), {"scale_student": 0.3, "scale_teacher": 0.3}
    leaves = [x.requires_grad_(n < 2) for n, x in enumerate(tensors)]
    head_map = torch.zeros(1, 1, dtype=torch.int32)
    scalars = (0.3, 0.3, None, None, True, 0, False, 1.0, True, True, True)
    masks = (None, None, torch.ones(1, 20, dtype=torch.uint8))
    torch.library.opcheck(attention_loss, (*leaves, head_map, *masks, None, None, *scalars))
    saved = (torch.zeros(1, 1, 20), torch.zeros(1, 1, 20), torch.zeros(1, 1, 1, 20))
    detached = [x.detach() for x in leaves]
    torch.library.opcheck(attention_backward, (torch.ones(()), *detached, head_map, *masks, *saved, *scalars))
    compiled = torch.compile(
        lambda q, k: 3 * attention_kl(q, k, *leaves[2:], **options, cu_seqlens=torch.tensor([0, 7, 20])),
        backend="aot_eager",
        fullgraph=True,
    )
    found = torch.autograd.grad(compiled(*leaves[:2]), leaves[:2])
    eager = torch.autograd.grad(3 * attention_kl(*leaves, **options, cu_seqlens=torch.tensor([0, 7, 20])), leaves[:2])
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


@inside
def test_the_attention_loss_is_one_graph():
    """With boundaries and a head map, checked on their device; lengths are dynamic from the second on."""
    graphs = []

    def call(q_s, k_s, q_t, k_t, bounds, head_map):  # type: ignore[no-untyped-def]
        how = {"cu_seqlens": bounds, "head_map": head_map, "window": 7, "impl": "triton"}
        return 3 * attention.attention_kl(q_s * 1.5, k_s, q_t, k_t, **how)

    torch.compiler.reset()
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for length in (12, 20, 17):
        tensors = maps(length, 2)
        leaves = [x.requires_grad_() for x in tensors[:2]]
        others = torch.tensor([0, 5, length]), torch.tensor([1, 0])
        expected, found = call(*tensors, *others), compiled(*tensors, *others)
        assert found.equal(expected)
        for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (found, expected)), strict=True):
            assert a.equal(b)
    assert len(graphs) == 2
