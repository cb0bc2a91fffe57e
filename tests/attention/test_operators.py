"""The torch engine of the attention loss as an operator: opcheck, one graph, and the gradients of eager."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_itk.attention import attention_kl
from lightning_itk.attention.operators import tiled_attention_loss


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


def layers(length=9, dtype=torch.float32, student=(4, 2, 8), teacher=(4, 4, 12)):
    g = torch.Generator().manual_seed(length)
    shapes = [(2, heads, length, dim) for q, k, dim in (student, teacher) for heads in (q, k)]
    tensors = [torch.randn(s, generator=g).to(dtype) for s in shapes]
    return [x.requires_grad_(n < 2) for n, x in enumerate(tensors)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_operator_passes_opcheck(dtype):
    q_s, k_s, *teacher = layers(dtype=dtype)
    rows = torch.rand(2, 9) < 0.6
    for masks in ((None, None, None, None), (torch.tensor([0, 5, 18]), rows, ~rows, torch.tensor([[0, 2]] * 4))):
        arguments = (*teacher, *masks, 0.3, 2.0, 0.2, None, True, 4, "reverse", 1.5)
        torch.library.opcheck(tiled_attention_loss, (q_s, k_s, *arguments, True), atol=1e-3, rtol=1e-3)
    torch.library.opcheck(tiled_attention_loss, (q_s.detach(), k_s, *arguments, True), atol=1e-3, rtol=1e-3)
    torch.library.opcheck(tiled_attention_loss, (q_s.detach(), k_s.detach(), *arguments, False))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_map", [None, "list", "tensor"])
def test_one_graph_with_the_values_and_gradients_of_eager(packed, head_map):
    graphs = 0

    def counted(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    pairs = {"list": [3, 1, 0, 2], "tensor": torch.tensor([[0, 2]] * 4)}.get(head_map)

    def call(q_s, k_s, q_t, k_t, bounds, rows, pairs):
        pairs = [3, 1, 0, 2] if head_map == "list" else pairs
        masks = {"cu_seqlens": bounds} if packed else {"key_mask": rows}
        return 3 * attention_kl(q_s * 1.5, k_s, q_t, k_t, row_mask=rows, window=5, head_map=pairs, **masks)

    compiled = torch.compile(call, fullgraph=True, backend=counted)
    for length in (9, 12, 15):
        tensors = layers(length)
        rows = torch.rand(2, length, generator=torch.Generator().manual_seed(0)) < 0.6
        others = torch.tensor([0, 5, 2 * length]), rows, pairs if head_map == "tensor" else None
        expected, found = call(*tensors, *others), compiled(*tensors, *others)
        assert found.equal(expected)
        for a, b in zip(*(torch.autograd.grad(x, tensors[:2]) for x in (found, expected)), strict=True):
            assert a.equal(b)
    assert graphs == 2  # lengths are dynamic from the second on


def test_a_compiled_graph_asserts_the_head_map():
    compiled = torch.compile(lambda *x: attention_kl(*x[:4], head_map=x[4]), fullgraph=True, backend="aot_eager")
    assert compiled(*layers(), torch.tensor([3, 1, 0, 2])).isfinite()
    with pytest.raises(RuntimeError, match="head_map must name teacher heads"):
        compiled(*layers(), torch.tensor([3, 1, 0, 4]))


def test_compiled_under_autocast_and_checkpointing():
    q_s, k_s, *teacher = layers()

    def call(q_s, k_s):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return 1.7 * checkpoint(lambda q, k: attention_kl(q.tanh(), k, *teacher), q_s, k_s, use_reentrant=False)

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        loss = function(q_s, k_s)
        results.append([loss, *torch.autograd.grad(loss, (q_s, k_s))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("trained", [0, 1])
def test_only_what_trains_gets_a_gradient_and_only_once(trained):
    tensors = [x.detach().requires_grad_(n == trained) for n, x in enumerate(layers())]
    loss = attention_kl(*tensors)
    (gradient,) = torch.autograd.grad(loss.square(), tensors[trained], create_graph=True)
    assert tensors[1 - trained].grad is None
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()
