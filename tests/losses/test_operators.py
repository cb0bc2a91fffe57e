"""The linear losses as operators: opcheck, one graph, gradients of eager, and a bound on their memory."""

import itertools

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning_itk.batch import IGNORE_INDEX
from lightning_itk.losses import (
    Head,
    chunked,
    linear_cross_entropy,
    linear_divergence,
    linear_kl_divergence,
    linear_kl_parts,
    linear_loss,
)
from lightning_itk.losses.chunked import linear_token_scores, scaled
from lightning_itk.losses.operators import chunked_loss

V = 37


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


def tensors(rows=11, dtype=torch.float32, ignored=True):
    """Leaves (hidden, weight, bias of the student), the teacher's hidden and weight, labels."""
    g = torch.Generator().manual_seed(rows)
    sizes = ((rows, 8), (V, 8), (V,), (rows, 12), (V + 3, 12))
    hidden, weight, bias, *teacher = (torch.randn(s, generator=g).to(dtype) for s in sizes)
    labels = torch.randint(0, V, (rows,), generator=g)
    if ignored:
        labels[::3] = IGNORE_INDEX
    return [x.requires_grad_() for x in (hidden, weight, bias)], teacher, labels


def kl(hidden, weight, bias, teacher, labels, **how):
    how = {"kind": "jsd", "temperature": 2.0, "ce_weight": 0.3} | how
    return linear_kl_parts(hidden, Head(weight, bias, 0.7, 5.0), *teacher, labels, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "forward", "reverse"])
def test_the_operator_passes_opcheck(kind, dtype):
    """All of it: schema, autograd registration, fake tensors, and AOT with dynamic shapes against eager."""
    (hidden, weight, bias), teacher, labels = tensors(dtype=dtype)
    matmul = torch.float64 if dtype == torch.float64 else torch.float32
    teacher = (None, None) if kind == "none" else (teacher[0], teacher[1][:V])
    numbers = (0.5, 2.0, 0.3, 1.3, True, matmul, matmul, 4096)
    for bias_of, targets, wanted in ((bias, labels, (True,) * 3), (None, labels, (True, False, False))):
        leaves = [x if x is None or want else x.detach() for x, want in zip((hidden, weight, bias_of), wanted)]  # noqa: B905
        arguments = (*leaves, 0.7, 5.0, *teacher, None, 1.0, None, targets, kind, *numbers, *wanted)
        torch.library.opcheck(chunked_loss, arguments)
    torch.library.opcheck(chunked_loss, (*(x.detach() for x in (hidden, weight)), *arguments[2:-3], *[False] * 3))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("loss", ["kl", "kl without labels", "ce"])
def test_one_graph_with_the_values_and_gradients_of_eager(loss, frozen):
    graphs = 0

    def counted(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def call(hidden, weight, bias, teacher_hidden, teacher_weight, labels):
        hidden = hidden * 1.5  # something before and behind
        if loss == "ce":
            return 3 * linear_cross_entropy(hidden, Head(weight, bias), labels)
        labels, how = (labels, {}) if loss == "kl" else (None, {"ce_weight": 0.0})
        total, ce, divergence = kl(hidden, weight, bias, (teacher_hidden, teacher_weight), labels, **how)
        return 3 * total + ce + divergence

    compiled = torch.compile(call, fullgraph=True, backend=counted, dynamic=None)
    for rows in (11, 14, 17, 0):  # the second length makes them dynamic; none is a size of its own
        leaves, teacher, labels = tensors(rows)
        if frozen:
            leaves[1:] = [x.detach() for x in leaves[1:]]
        trained = [x for x in leaves if x.requires_grad]
        expected, found = call(*leaves, *teacher, labels), compiled(*leaves, *teacher, labels)
        assert found.equal(expected)
        for a, b in zip(*(torch.autograd.grad(x, trained) for x in (found, expected)), strict=True):
            assert a.equal(b)
    assert graphs <= 3


def test_compiled_with_autograd_under_autocast_and_checkpointing():
    """What AOT autograd makes of it, which inductor is given too."""
    (hidden, weight, bias), teacher, labels = tensors()

    def call(hidden, weight, bias):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = checkpoint(torch.tanh, hidden, use_reentrant=False)
            return 1.7 * kl(states, weight, bias, teacher, labels).loss

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        loss = function(hidden, weight, bias)
        results.append([loss, *torch.autograd.grad(loss, (hidden, weight, bias))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_checkpointed_loss_is_itself():
    (hidden, weight, bias), teacher, labels = tensors()
    plain = kl(hidden, weight, bias, teacher, labels).loss
    again = checkpoint(lambda *x: kl(*x, teacher, labels).loss, hidden, weight, bias, use_reentrant=False)
    assert again.equal(plain)
    for a, b in zip(*(torch.autograd.grad(2 * x, (hidden, weight, bias)) for x in (again, plain)), strict=True):
        assert a.equal(b)


def test_a_second_derivative_is_refused():
    (hidden, weight, bias), teacher, labels = tensors()
    loss = kl(hidden, weight, bias, teacher, labels).loss
    (gradient,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_upstream_gradients_are_rounded_once(dtype):
    gradient, factor = torch.randn(70, 33).to(dtype), torch.tensor(1 / 3)
    assert scaled(gradient, factor, dtype).equal((gradient.float() * factor).to(dtype))


class Live(TorchDispatchMode):
    """The most bytes of tensors, made while it is on, that lived at one time."""

    def __init__(self):
        super().__init__()
        self.storages, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        own = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in own:
                storage = leaf.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return result


@pytest.mark.parametrize("bound", [1 << 20, 1 << 19])
def test_max_scratch_bytes_bounds_what_lives(bound):
    """512 rows of 4,096 logits are 8 MiB a model; inputs and gradients are a hundredth of the bound."""
    rows, vocab = 512, 4096
    hidden, weight = torch.randn(rows, 2, requires_grad=True), torch.randn(vocab, 2, requires_grad=True)
    teacher, labels = (torch.randn(rows, 2), torch.randn(vocab, 2)), torch.randint(0, vocab, (rows,))
    total_variation = lambda s, t, _: (s.softmax(-1) - t.softmax(-1)).abs().sum(-1)  # noqa: E731
    entropy = lambda s, _: torch.special.entr(s.softmax(-1)).sum(-1)  # noqa: E731
    calls = {
        **{
            f"{kind} {temperature}": lambda how={"kind": kind, "temperature": temperature}, **bound: (  # noqa: B006
                linear_kl_divergence(hidden, weight, *teacher, labels, ce_weight=0.5, **how, **bound)
            )
            for kind, temperature in itertools.product(("forward", "reverse", "jsd"), (1.0, 2.0))
        },
        "ce": lambda **bound: linear_cross_entropy(hidden, weight, labels, **bound),
        "own": lambda **bound: linear_divergence(total_variation, hidden, weight, *teacher, labels, **bound),
        "own of one": lambda **bound: linear_loss(entropy, hidden, weight, labels, **bound),
        "scores": lambda **bound: linear_token_scores(hidden, weight, labels, ranks=True, **bound).nll.sum(),
    }
    extra = 4 * (weight.numel() + 3 * hidden.numel()) + 2 * weight.nbytes  # gradients, and copies of kept rows
    for name, call in calls.items():
        with Live() as live:
            bounded = call(max_scratch_bytes=bound)
        assert live.most <= bound + extra, f"{name}: {live.most:,} bytes"
        torch.testing.assert_close(bounded, call())
        with pytest.raises(ValueError, match="max_scratch_bytes must be positive"):
            call(max_scratch_bytes=0)


def test_any_bound_leaves_one_row():
    (hidden, weight, bias), teacher, labels = tensors()
    a, b = (kl(hidden, weight, bias, teacher, labels, **how).loss for how in ({"max_scratch_bytes": 1}, {}))
    torch.testing.assert_close(a, b)
    assert chunked.chunk_rows(V, max_scratch_bytes=1) == 1
