"""The kernels on a real device: bf16 and fp16, real shapes, determinism, no host synchronisation, graphs, compile.

Run by `make gpu`. References are fp64 on the same rounded inputs, computed in slices.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton

from lightning_itk.kernels import attention_problem, launch
from lightning_itk.kernels.attention import attention_kl
from lightning_itk.kernels.gemm import widens
from lightning_itk.kernels.kl import kl_rows
from lightning_itk.kernels.linear_kl import linear_cross_entropy, linear_kl_divergence

device = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(launch.INTERPRET or not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and not launch.INTERPRET and launch.supported(device) is not None,
        reason="no tiles for this GPU",
    ),
]
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 3e-3, torch.float32: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def heads(n: int, v: int, width: int, noise: float, dtype: torch.dtype, std: float = 4.0) -> list[Tensor]:
    """Teacher heads with logits of standard deviation `std`, and a student `noise` away from them."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, width, device=device), torch.randn(v, width, device=device) * std / width**0.5
    student = [x + noise * x.std() * torch.randn_like(x) for x in (hidden, weight)]
    return [x.to(dtype) for x in (*student, hidden, weight)]


def exact_linear(
    hidden: Tensor, weight: Tensor, th: Tensor, tw: Tensor, labels: Tensor
) -> tuple[float, Tensor, Tensor]:
    """KL per row and fp64 gradients of the forward KL sum, 32 rows at a time."""
    d_hidden, d_weight, total = torch.zeros_like(hidden, dtype=torch.float64), torch.zeros_like(weight).double(), 0.0
    w, t = weight.double(), tw.double()
    for part in torch.arange(len(hidden), device=device).split(32):
        x = hidden[part].double()
        lq, lp = (x @ w.T).log_softmax(-1), (th[part].double() @ t.T).log_softmax(-1)
        kept = (labels[part] != -100)[:, None]
        total += float(((lp.exp() * (lp - lq)) * kept).sum())
        dz = (lq.exp() - lp.exp()) * kept
        d_hidden[part] = dz @ w
        d_weight += dz.T @ x
    return total, d_hidden, d_weight


@DTYPES
@pytest.mark.parametrize("v", [32_000, 128_256, 151_936, 262_144, 50_257])
@pytest.mark.parametrize("noise", [0.5, 0.06, 0.011], ids=["far", "near", "converged"])
def test_linear_kl_gradients(v, noise, dtype):
    tensors = heads(160, v, 512, noise, dtype)
    labels = torch.randint(v, (160,), device=device)
    labels[::5] = -100
    leaves = [x.clone().requires_grad_(n < 2) for n, x in enumerate(tensors)]
    loss = linear_kl_divergence(*leaves, labels)[0]
    (loss * 0.5).backward()
    with torch.no_grad():
        evaluated = linear_kl_divergence(*leaves, labels)[0]
    total, d_hidden, d_weight = exact_linear(*tensors, labels)
    print(f"KL per token {total / 128:.2e}")
    assert abs(loss.item() - total) < 1e-3 * total + 1e-4
    assert abs(evaluated.item() - total) < 1e-3 * total + 1e-4
    assert relative(leaves[0].grad, d_hidden * 0.5) < TOLERANCE[dtype]
    assert relative(leaves[1].grad, d_weight * 0.5) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("scratch", [2 << 30, 128 << 20], ids=["all dlogits", "chunks that add up"])
def test_linear_chunks_agree(scratch, dtype):
    tensors = heads(1500, 32_000, 256, 0.3, dtype)
    labels = torch.full((1500,), 7, device=device)
    leaves = [x.clone().requires_grad_(n < 2) for n, x in enumerate(tensors)]
    linear_kl_divergence(*leaves, labels, max_scratch_bytes=scratch)[0].backward()
    _, d_hidden, d_weight = exact_linear(*tensors, labels)
    assert relative(leaves[0].grad, d_hidden) < TOLERANCE[dtype]
    assert relative(leaves[1].grad, d_weight) < TOLERANCE[dtype]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_multiplied_into_fp32_without_copies(dtype, accumulate):
    if torch.version.cuda:
        assert widens(device, dtype, accumulate)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@DTYPES
def test_kl_on_logits(kind, dtype):
    torch.manual_seed(0)
    teacher = (4 * torch.randn(64, 128_256, device=device)).to(dtype)
    student = (teacher + 0.3 * torch.randn_like(teacher)).to(dtype).requires_grad_()
    upstream = torch.rand(64, device=device)
    kl_rows(student, teacher, kind=kind, temperature=2.0).backward(upstream)
    exact = student.detach().double().requires_grad_()
    lq, lp = (exact / 2).log_softmax(-1), (teacher.double() / 2).log_softmax(-1)
    if kind == "forward":
        rows = (lp.exp() * (lp - lq)).sum(-1)
    elif kind == "reverse":
        rows = (lq.exp() * (lq - lp)).sum(-1)
    else:
        lm = ((lp.exp() + lq.exp()) / 2).log()
        rows = ((lp.exp() * (lp - lm)).sum(-1) + (lq.exp() * (lq - lm)).sum(-1)) / 2
    (4 * rows).backward(upstream.double())
    assert relative(student.grad, exact.grad) < TOLERANCE[dtype]


def attention(batch, heads, length, dims, noise, dtype, std=3.0) -> tuple[list[Tensor], dict[str, float]]:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    hs, hs_kv, ht, ht_kv = heads
    shapes = ((hs, dims[0]), (hs_kv, dims[0]), (ht, dims[1]), (ht_kv, dims[1]))
    tensors = [torch.randn(batch, length, h, d, device=device).transpose(1, 2) for h, d in shapes]
    if noise:
        tensors[:2] = [x + noise * torch.randn_like(x) for x in tensors[2:]]
    scales = {"scale_student": std * dims[0] ** -0.5, "scale_teacher": std * dims[1] ** -0.5}
    return [x.to(dtype) for x in tensors], scales


def exact_attention(
    q_s, k_s, q_t, k_t, *, scale_student, scale_teacher, seen, kind="forward"
) -> tuple[float, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """Value and fp64 gradients, one head at a time; heads must match one to one."""
    heads, group, group_t = q_s.shape[1], q_s.shape[1] // k_s.shape[1], q_t.shape[1] // k_t.shape[1]
    q, k = (x.detach().double().requires_grad_() for x in (q_s, k_s))
    total = 0.0
    for h in range(heads):
        x = (scale_student * q[:, h] @ k[:, h // group].mT).masked_fill(~seen, -1e30)
        y = (scale_teacher * q_t[:, h].double() @ k_t[:, h // group_t].double().mT).masked_fill(~seen, -1e30)
        lq, lp = x.log_softmax(-1), y.log_softmax(-1)
        value = (lp.exp() * (lp - lq)).sum() if kind == "forward" else (lq.exp() * (lq - lp)).sum()
        (value / heads).backward()
        total += float(value) / heads
    return total, q.grad, k.grad


@DTYPES
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.02], ids=["far", "near", "converged"])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_attention_gradients(dim, noise, dtype):
    if (dim, dtype) == (256, torch.float32):
        pytest.skip("compiles for ten seconds; 128 shows the same")
    tensors, scales = attention(2, (4, 2, 4, 2), 1000, (dim, dim), noise, dtype)
    leaves = [x.requires_grad_(n < 2) for n, x in enumerate(tensors)]
    loss = attention_kl(*leaves, **scales)
    (loss * 0.5).backward()
    seen = torch.ones(1000, 1000, dtype=torch.bool, device=device).tril()
    total, dq, dk = exact_attention(*tensors, **scales, seen=seen)
    print(f"KL per row {total / 2000:.2e}")
    assert abs(loss.item() - total) < 1e-3 * total
    assert relative(leaves[0].grad, 0.5 * dq) < TOLERANCE[dtype]
    assert relative(leaves[1].grad, 0.5 * dk) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["forward", "reverse"])
@DTYPES
def test_attention_masks(kind, dtype):
    tensors, scales = attention(2, (4, 1, 4, 2), 700, (64, 128), 0.0, dtype)
    leaves = [x.requires_grad_(n < 2) for n, x in enumerate(tensors)]
    cu_seqlens = torch.tensor([0, 130, 513, 700, 1011, 1400], dtype=torch.int32, device=device)
    key_mask = torch.ones(2, 700, dtype=torch.bool, device=device)
    key_mask[1, -60:] = False
    loss = attention_kl(
        *leaves, **scales, window=200, cu_seqlens=cu_seqlens, key_mask=key_mask, row_mask=key_mask, kind=kind
    )
    loss.backward()
    ids = torch.bucketize(torch.arange(1400, device=device), cu_seqlens, right=True).view(2, 700)
    i, j = torch.arange(700, device=device)[:, None], torch.arange(700, device=device)
    seen = (j <= i) & (j > i - 200) & (ids[:, :, None] == ids[:, None]) & key_mask[:, None]
    kept = key_mask[:, :, None] & seen.any(-1, keepdim=True)
    seen = seen | ~kept  # dropped rows become equal maps below
    q_s, q_t = (x.detach() * kept[:, None] for x in (tensors[0], tensors[2]))
    total, dq, dk = exact_attention(q_s, tensors[1], q_t, tensors[3], **scales, seen=seen, kind=kind)
    assert abs(loss.item() - total) < 1e-3 * total
    assert relative(leaves[0].grad, dq * kept[:, None]) < TOLERANCE[dtype]
    assert relative(leaves[1].grad, dk) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_one_kernel_for_both_gradients_is_deterministic_and_agrees_with_two(kind, monkeypatch):
    """Each program walks several blocks of keys: what it adds to dq must be seen when it comes by again."""
    tensors, scales = attention(2, (4, 2, 4, 2), 6000, (128, 128), 0.0, torch.bfloat16)
    leaves = [x.requires_grad_(n < 2) for n, x in enumerate(tensors)]
    two = torch.autograd.grad(attention_kl(*leaves, **scales, kind=kind), leaves[:2])
    monkeypatch.setattr(attention_problem, "FUSED_BACKWARD", True)
    once, again = (torch.autograd.grad(attention_kl(*leaves, **scales, kind=kind), leaves[:2]) for _ in range(2))
    assert all(map(torch.equal, once, again))
    assert all(relative(a, b.double()) < TOLERANCE[torch.bfloat16] for a, b in zip(once, two, strict=True))


def test_attention_memory_is_linear():
    """At 32k tokens one fp32 map of one head would be 4 GiB."""
    tensors, scales = attention(1, (8, 2, 8, 2), 32_768, (128, 128), 0.0, torch.bfloat16)
    leaves = [x.requires_grad_(n < 2) for n, x in enumerate(tensors)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention_kl(*leaves, **scales).backward()
    assert torch.cuda.max_memory_allocated() - before < 300 << 20
    assert all(bool(x.grad.isfinite().all()) for x in leaves[:2])


def linear_step() -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    tensors = heads(700, 32_000, 256, 0.3, torch.bfloat16)
    labels = torch.randint(32_000, (700,), device=device)
    leaves = [x.requires_grad_(n < 2) for n, x in enumerate(tensors)]

    def step() -> list[Tensor]:
        loss = linear_kl_divergence(*leaves, labels, ce_weight=0.5, temperature=2.0)[0]
        return [loss, *torch.autograd.grad(loss * 0.5, leaves[:2])]

    return step, leaves


def cross_entropy_step() -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    hidden, weight, *_ = heads(700, 32_000, 256, 0.3, torch.bfloat16)
    labels = torch.randint(32_000, (700,), device=device)
    leaves = [x.requires_grad_() for x in (hidden, weight)]

    def step() -> list[Tensor]:
        loss = linear_cross_entropy(*leaves, labels)
        return [loss, *torch.autograd.grad(loss * 0.5, leaves)]

    return step, leaves


def logits_step() -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    leaves = [torch.randn(300, 32_000, device=device).bfloat16().requires_grad_(n == 0) for n in range(2)]

    def step() -> list[Tensor]:
        rows = kl_rows(*leaves, kind="jsd", beta=0.3, temperature=2.0)
        return [rows, *torch.autograd.grad(rows.sum(), leaves[:1])]

    return step, leaves


def attention_step() -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    tensors, scales = attention(2, (8, 2, 8, 4), 900, (128, 64), 0.0, torch.bfloat16)
    rows = torch.rand(2, 900, device=device) > 0.7
    cu_seqlens = torch.tensor([0, 300, 1000, 1800], dtype=torch.int32, device=device)
    leaves = [x.requires_grad_(n < 2) for n, x in enumerate(tensors)]

    def step() -> list[Tensor]:
        loss = attention_kl(*leaves, **scales, row_mask=rows, cu_seqlens=cu_seqlens)
        return [loss, *torch.autograd.grad(loss * 0.5, leaves[:2])]

    return step, leaves


STEPS = pytest.mark.parametrize("make", [linear_step, cross_entropy_step, logits_step, attention_step])


@STEPS
def test_bit_identical_and_without_host_synchronisation(make):
    step, _ = make()
    first = step()
    with no_synchronisation():
        again = [step() for _ in range(3)]
    assert all(torch.equal(a, b) for run in again for a, b in zip(first, run, strict=True))


@STEPS
def test_cuda_graph(make):
    step, _ = make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_compiled_without_graph_breaks():
    hidden = [x.requires_grad_(n < 2) for n, x in enumerate(heads(300, 32_000, 128, 0.3, torch.bfloat16))]
    maps, scales = attention(1, (4, 2, 4, 2), 500, (64, 64), 0.0, torch.bfloat16)
    maps = [x.requires_grad_(n < 2) for n, x in enumerate(maps)]
    logits = [torch.randn(300, 32_000, device=device).bfloat16().requires_grad_(n == 0) for n in range(2)]
    for loss, leaves in (
        (lambda *x: linear_kl_divergence(*x)[0] * 0.5, hidden),
        (lambda *x: attention_kl(*x, **scales) * 0.5, maps),
        (lambda *x: kl_rows(*x).sum() * 0.5, logits),
    ):
        trained = [x for x in leaves if x.requires_grad]
        found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), trained)
        expected = torch.autograd.grad(loss(*leaves), trained)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_gives_the_half_precision_gradient():
    hidden, weight, *teacher = heads(200, 32_000, 256, 0.3, torch.float32)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        linear_kl_divergence(*leaves, *teacher)[0].backward()
    rounded = [x.bfloat16() for x in (hidden, weight, *teacher)]
    _, d_hidden, d_weight = exact_linear(*rounded, torch.zeros(200, dtype=torch.int64, device=device))
    assert leaves[0].grad.dtype == leaves[1].grad.dtype == torch.float32
    assert relative(leaves[0].grad, d_hidden) < 3e-3
    assert relative(leaves[1].grad, d_weight) < 3e-3


def test_temperature_and_beta_do_not_recompile():
    step = [torch.randn(8, 4096, device=device) for _ in range(2)]
    kl_rows(*step, kind="jsd", beta=0.5, temperature=1.0)
    compilations = []
    hook = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **found: compilations.append(found)
    try:
        for beta, temperature in ((0.3, 1.0), (0.5, 2.5), (1.0, 4)):
            kl_rows(*step, kind="jsd", beta=beta, temperature=temperature)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook
    assert not compilations
