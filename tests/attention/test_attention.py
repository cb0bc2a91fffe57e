"""The attention loss against fp64 autograd on materialised maps."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_itk.attention import attention_kl, tiled
from lightning_itk.attention.tiled import group_heads
from lightning_itk.batch import IGNORE_INDEX, Sample, next_token_labels, pad


def inputs(
    b: int = 2, s: int = 13, heads: tuple[int, int, int, int] = (4, 2, 4, 4), dims: tuple[int, int] = (8, 6), std=1.5
) -> list[Tensor]:
    torch.manual_seed(0)
    hs, ks, ht, kt = heads
    shapes = [(b, hs, s, dims[0]), (b, ks, s, dims[0]), (b, ht, s, dims[1]), (b, kt, s, dims[1])]
    return [torch.randn(shape, dtype=torch.float64) * std for shape in shapes]


def reference(
    q_s,
    k_s,
    q_t,
    k_t,
    *,
    scale_student=None,
    scale_teacher=None,
    causal=True,
    window=None,
    cu_seqlens=None,
    key_mask=None,
    row_mask=None,
    kind="forward",
    temperature=1.0,
    head_map=None,
    softcap_student=None,
    softcap_teacher=None,
) -> Tensor:
    """Every map in memory, one plain formula."""
    b, hs, s, _ = q_s.shape
    position = torch.arange(s)
    visible = torch.ones(b, s, s, dtype=torch.bool)
    if causal:
        visible &= position[None, :] <= position[:, None]
    if window is not None:
        visible &= position[None, :] > position[:, None] - window
    if cu_seqlens is not None:
        starts = torch.zeros(b * s, dtype=torch.long)
        starts[cu_seqlens[:-1].long()] = 1
        segment = starts.cumsum(0).view(b, s)
        visible &= segment[:, :, None] == segment[:, None, :]
    if key_mask is not None:
        visible &= key_mask[:, None, :]
    rows = visible.any(-1) if row_mask is None else visible.any(-1) & row_mask

    def log_map(q, k, scale, cap):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        scores = (scores / temperature).masked_fill(~visible[:, None], -1e30)
        return F.log_softmax(scores, -1)

    log_s = log_map(q_s, k_s, scale_student, softcap_student)
    log_t = log_map(q_t, k_t, scale_teacher, softcap_teacher)
    head_map = group_heads(hs, q_t.shape[1]) if head_map is None else torch.as_tensor(head_map).view(hs, -1)
    total = torch.zeros(b, s, dtype=q_s.dtype)
    for h in range(hs):
        for g in head_map[h].tolist():
            p, q = (log_t[:, g], log_s[:, h]) if kind == "forward" else (log_s[:, h], log_t[:, g])
            total = total + (p.exp() * (p - q)).sum(-1) / (hs * head_map.shape[1])
    return (total * rows).sum()


def check(tensors: list[Tensor], upstream: float = 1.0, dtype=torch.float64, tolerance=1e-10, **options: Any) -> Tensor:
    q_s, k_s, q_t, k_t = tensors
    results = []
    for function, cast in ((attention_kl, dtype), (reference, torch.float64)):
        q, k = (t.to(dtype).to(cast).clone().requires_grad_() for t in (q_s, k_s))
        value = function(q, k, q_t.to(dtype).to(cast), k_t.to(dtype).to(cast), **options)
        (value * upstream).backward()
        results.append([value.detach().double(), q.grad.double(), k.grad.double()])
    for ours, expected in zip(*results, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * (1 + float(expected.abs().max())))
    return results[0][0]


PADDED = torch.ones(2, 13, dtype=torch.bool)
PADDED[0, 9:], PADDED[1, :4] = False, False
ROWS = torch.rand(2, 13, generator=torch.Generator().manual_seed(1)) < 0.5
PACKED = torch.tensor([0, 5, 6, 13, 20, 26], dtype=torch.int32)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
@pytest.mark.parametrize("heads", [(4, 2, 4, 4), (4, 1, 4, 2), (2, 2, 6, 3), (6, 3, 2, 1), (3, 3, 3, 1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": 3},
        {"window": 1},
        {"key_mask": PADDED},
        {"key_mask": PADDED, "causal": False, "row_mask": ROWS},
        {"cu_seqlens": PACKED},
        {"cu_seqlens": PACKED, "window": 4, "row_mask": ROWS},
        {"cu_seqlens": PACKED[[0, 2, 5]], "causal": False, "key_mask": PADDED},  # a segment that crosses a row's end
        {"temperature": 2.5, "softcap_student": 3.0, "softcap_teacher": 2.0},
        {"scale_student": 1.0, "scale_teacher": 0.2, "row_mask": ROWS},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_equals_materialised_maps(kind, heads, options) -> None:
    if options.get("cu_seqlens") is not None and len(options["cu_seqlens"]) == 3:
        options = options | {"cu_seqlens": PACKED[[0, 2, 5]]}
        twin = options | {"cu_seqlens": torch.tensor([0, 6, 13, 26])}  # the row's end is a boundary either way
        assert attention_kl(*inputs(heads=heads), **options) == attention_kl(*inputs(heads=heads), **twin)
        options = twin
    value = check(inputs(heads=heads), upstream=-3.7, kind=kind, **options)
    assert value > 0 or options.get("window") == 1


@pytest.mark.parametrize("tile", [1, 300, 1 << 22])
@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_tile_size_does_not_matter(monkeypatch, tile, kind) -> None:
    monkeypatch.setitem(tiled.TILE_SCORES, "cpu", tile)
    check(inputs(b=3, s=37), kind=kind, window=9, row_mask=torch.rand(3, 37) < 0.6)
    check(inputs(b=3, s=37), kind=kind, causal=False)


@pytest.mark.parametrize(
    "head_map", [[3, 0, 1, 1], [[0, 3], [1, 2], [2, 2], [5, 0]], torch.tensor([[5], [4], [3], [2]])]
)
@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_explicit_head_map(head_map, kind) -> None:
    check(inputs(heads=(4, 2, 6, 3)), kind=kind, head_map=head_map)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_student_equal_to_teacher(kind) -> None:
    q, k, _, _ = (t.float() for t in inputs())
    q, k = q.requires_grad_(), k.requires_grad_()
    value = attention_kl(q, k, q, k, kind=kind)
    value.backward()
    assert abs(value.item()) < 1e-5
    assert q.grad.abs().max() < 1e-6
    assert k.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_student_close_to_teacher_with_wide_scores(kind) -> None:
    """Scores of standard deviation 12: the gradient survives although the divergence is tiny."""
    q, k, _, _ = inputs(s=65, heads=(4, 2, 4, 2), dims=(16, 16), std=12**0.5)
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4
    assert 11 < scores.std() < 13
    torch.manual_seed(1)
    tensors = [q + 1e-3 * torch.randn_like(q), k + 1e-3 * torch.randn_like(k), q, k]
    rows = 2 * 65
    assert check(tensors, kind=kind) / rows < 1e-4
    check(tensors, kind=kind, dtype=torch.float32, tolerance=2e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 6e-3), (torch.float16, 2e-3), (torch.float32, 1e-5)])
def test_low_precision_inputs(dtype, tolerance) -> None:
    """The arithmetic is in fp32: only the returned gradients are rounded to the inputs' dtype."""
    check(inputs(s=31), dtype=dtype, tolerance=tolerance, upstream=0.3)
    tensors = [t.to(dtype).requires_grad_() for t in inputs()]
    value = attention_kl(*tensors)
    value.backward()
    assert value.dtype == torch.float32
    assert tensors[0].grad.dtype == dtype
    assert tensors[2].grad is None
    assert tensors[3].grad is None


@pytest.mark.parametrize("masks", [{"row_mask": torch.zeros(2, 13).bool()}, {"key_mask": torch.zeros(2, 13).bool()}])
def test_nothing_to_compare(masks) -> None:
    q_s, k_s, q_t, k_t = inputs()
    q_s, k_s = q_s.requires_grad_(), k_s.requires_grad_()
    value = attention_kl(q_s, k_s, q_t, k_t, **masks)
    value.backward()
    assert value.item() == 0
    assert q_s.grad.abs().max() == 0
    assert k_s.grad.abs().max() == 0


def test_extreme_scores_stay_finite() -> None:
    """The reference code gives nan where the student's probability is exactly 0."""
    q_s, k_s, q_t, k_t = (t.float() * 40 for t in inputs())
    q_s, k_s = q_s.requires_grad_(), k_s.requires_grad_()
    value = attention_kl(q_s, k_s, q_t, k_t)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(q_s.grad).all()


def test_padding_left_right_and_packing_agree() -> None:
    """Samples of 4, 9 and 7 tokens give the same loss and gradients padded on either side and packed."""
    lengths = [4, 9, 7]
    one = [inputs(b=1, s=n) for n in lengths]
    alone = sum(attention_kl(*tensors) for tensors in one)

    def padded(left: bool) -> Tensor:
        width = max(lengths)
        rows = []
        for i in range(4):
            fill = [(width - n, 0) if left else (0, width - n) for n in lengths]
            rows.append(torch.cat([F.pad(t[i], (0, 0, *f), value=7.0) for t, f in zip(one, fill, strict=True)]))
        mask = torch.cat([F.pad(torch.ones(1, n), f) for n, f in zip(lengths, fill, strict=True)]).bool()
        return attention_kl(*rows, key_mask=mask, row_mask=mask)

    packed = [torch.cat([t[i] for t in one], dim=2) for i in range(4)]
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)])
    for value in (padded(True), padded(False), attention_kl(*packed, cu_seqlens=cu_seqlens)):
        torch.testing.assert_close(value, alone)


def test_averaging_a_group_has_the_gradient_of_the_averaged_map() -> None:
    q_s, k_s, q_t, k_t = inputs(heads=(2, 2, 6, 6))
    q_s, k_s = q_s.requires_grad_(), k_s.requires_grad_()
    attention_kl(q_s, k_s, q_t, k_t).backward()
    future = torch.ones(13, 13).bool().triu(1)
    p_t = (q_t @ k_t.mT / 6**0.5).masked_fill(future, -1e30).softmax(-1).unflatten(1, (2, 3)).mean(2)
    q, k = q_s.detach().clone().requires_grad_(), k_s.detach().clone()
    log_s = (q @ k.mT / 8**0.5).masked_fill(future, -1e30).log_softmax(-1)
    (p_t * (p_t.clamp_min(1e-300).log() - log_s)).sum().div(2).backward()
    torch.testing.assert_close(q_s.grad, q.grad)


def reference_code_loss(maps_s: Tensor, maps_t: Tensor, mask: Tensor) -> Tensor:
    """L_attn of the reference code (research: papers, section 1.1): batchmean-like over layers, heads and masked rows.

    Maps [L, B, H, S, S]; mask [B, S] says which query rows count.
    """
    causal = torch.ones(maps_s.shape[-2:], dtype=torch.bool).tril()
    keep = mask[None, :, None, :, None] & causal
    pointwise = F.kl_div(maps_s.clamp_min(1e-300).log(), maps_t, reduction="none").masked_fill(~keep, 0.0)
    layers, heads = maps_s.shape[0], maps_s.shape[2]
    return pointwise.sum() / (mask.sum() * heads * layers)


def maps(q: Tensor, k: Tensor) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    future = torch.ones(q.shape[2], q.shape[2]).bool().triu(1)
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf).softmax(-1)


def batch_of(labels: list[int]) -> Any:
    tokens = np.arange(len(labels)) + 1
    return pad([Sample(tokens, np.array(labels), 0)], pad_id=0)


def test_agrees_with_the_reference_code_on_shifted_rows() -> None:
    layers = [inputs(b=1, s=8, heads=(4, 2, 4, 4)), inputs(b=1, s=8, heads=(4, 2, 4, 4), std=0.7)]
    batch = batch_of([IGNORE_INDEX] * 3 + [5, 6, 7, IGNORE_INDEX, IGNORE_INDEX])
    rows = next_token_labels(batch) != IGNORE_INDEX
    ours = sum(attention_kl(*tensors, row_mask=rows) for tensors in layers) / (len(layers) * rows.sum())
    student = torch.stack([maps(q, k) for q, k, _, _ in layers])
    teacher = torch.stack([maps(q, k) for _, _, q, k in layers])
    torch.testing.assert_close(ours, reference_code_loss(student, teacher, rows))


def test_the_off_by_one_of_the_reference_code_is_not_copied() -> None:
    """Labels [x, x, x, r1, r2, eos, x, x]: positions 2, 3, 4 predict the response; the unshifted mask takes 3, 4, 5."""
    batch = batch_of([IGNORE_INDEX] * 3 + [5, 6, 7, IGNORE_INDEX, IGNORE_INDEX])
    shifted, unshifted = next_token_labels(batch) != IGNORE_INDEX, batch["labels"] != IGNORE_INDEX
    assert shifted[0].nonzero().flatten().tolist() == [2, 3, 4]
    assert unshifted[0].nonzero().flatten().tolist() == [3, 4, 5]
    q_s, k_s, q_t, k_t = inputs(b=1, s=8)
    gradients = []
    for rows in (shifted, unshifted):
        q = q_s.clone().requires_grad_()
        attention_kl(q, k_s, q_t, k_t, row_mask=rows).backward()
        gradients.append(q.grad.abs().sum((0, 1, 3)) > 0)
    assert gradients[0].nonzero().flatten().tolist() == [2, 3, 4]  # the first response token is distilled
    assert not gradients[1][2]


class PeakMemory(TorchDispatchMode):
    """Counts the bytes alive that were made under it, and the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.largest = 0
        self.seen: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.alive -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            self.largest = max(self.largest, storage.nbytes() // tensor.element_size())
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out


def test_memory_grows_linearly(monkeypatch) -> None:
    """Tiles of 64 query rows: nothing of S x S, and twice the tokens need about twice the memory."""
    peaks = {}
    for s in (4096, 8192):
        monkeypatch.setitem(tiled.TILE_SCORES, "cpu", 64 * s)
        gc.collect()
        tensors = [t.float() for t in inputs(b=1, s=s, heads=(1, 1, 1, 1), dims=(8, 8))]
        tensors[0].requires_grad_()
        tensors[1].requires_grad_()
        with PeakMemory() as memory:
            attention_kl(*tensors, row_mask=torch.arange(s)[None] >= s * 3 // 4).backward()
        assert memory.largest <= 64 * s < s * s
        peaks[s] = memory.peak
    print(f"peak bytes: {peaks}")
    assert 1.7 < peaks[8192] / peaks[4096] < 2.3


def test_default_tile_bounds_memory() -> None:
    """With the default tile, 32 heads at S = 2048 stay within a few tiles (a pair of fp32 maps is 1 GiB)."""
    tensors = [t.float() for t in inputs(b=1, s=2048, heads=(32, 8, 32, 8), dims=(4, 4))]
    tensors[0].requires_grad_()
    with PeakMemory() as memory:
        attention_kl(*tensors, row_mask=torch.arange(2048)[None] >= 1700).backward()
    print(f"peak {memory.peak / 2**20:.0f} MiB")
    assert memory.peak < 12 * 4 * 8 * 32 * 2048  # 8 query rows at least


def test_only_kept_rows_are_computed(monkeypatch) -> None:
    seen = []
    original = tiled.Scores.__call__
    monkeypatch.setattr(tiled.Scores, "__call__", lambda self, q, k: seen.append(q.shape[2]) or original(self, q, k))
    rows = torch.zeros(2, 13, dtype=torch.bool)
    rows[0, [2, 9]] = True
    attention_kl(*inputs(), row_mask=rows)
    assert seen == [2, 2]


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"cu_seqlens": torch.tensor([0, 5, 300, 310, 600])}])
@pytest.mark.parametrize("sparse", [False, True])
def test_no_tile_is_larger_than_the_budget(monkeypatch, options, sparse) -> None:
    """Also where every row sees few keys: many rows of a window still cover many keys."""
    scored = []
    original = tiled.Scores.__call__
    monkeypatch.setattr(
        tiled.Scores,
        "__call__",
        lambda self, q, k: (
            scored.append((q.shape[2], q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])) or original(self, q, k)
        ),
    )
    monkeypatch.setitem(tiled.TILE_SCORES, "cpu", 4 * 40 * 60)
    rows = torch.arange(600).remainder(7)[None] == 0 if sparse else None
    check(inputs(b=1, s=600), row_mask=rows, **options)
    assert all(scores <= 4 * 40 * 60 or count <= 8 for count, scores in scored)
    if options.get("window"):
        assert max(count for count, _ in scored) >= 12  # and no smaller than need be


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_what_nobody_sees_gets_no_gradient_at_all(kind) -> None:
    q_s, k_s, q_t, k_t = inputs()
    k_s.requires_grad_()
    seen = torch.ones(2, 13, dtype=torch.bool)
    seen[:, [0, 5, 12]] = False
    attention_kl(q_s, k_s, q_t, k_t, key_mask=seen, kind=kind).backward()
    assert (k_s.grad[:, :, [0, 5, 12]] == 0).all()
    assert (k_s.grad[:, :, 1] != 0).any()


@pytest.mark.parametrize("causal", [True, False])
def test_other_documents_are_hardly_computed(monkeypatch, causal) -> None:
    """200 + 3 x 10 + 70 packed tokens: each long document is scored alone, the short ones go with a neighbour."""
    scored = []
    original = tiled.Scores.__call__
    monkeypatch.setattr(
        tiled.Scores, "__call__", lambda self, q, k: scored.append(q.shape[2] * k.shape[2]) or original(self, q, k)
    )
    cu_seqlens = torch.tensor([0, 200, 210, 220, 230, 300], dtype=torch.int32)
    check(inputs(b=1, s=300), cu_seqlens=cu_seqlens, causal=causal)
    assert sum(scored) / 2 == 200 * 200 + 100 * 100  # of student and teacher; 90,000 without borders


def test_the_causal_triangle_is_cut_into_tiles(monkeypatch) -> None:
    scored = []
    original = tiled.Scores.__call__
    monkeypatch.setattr(
        tiled.Scores, "__call__", lambda self, q, k: scored.append(q.shape[2] * k.shape[2]) or original(self, q, k)
    )
    monkeypatch.setitem(tiled.TILE_SCORES, "cpu", 16 * 256 * 4)
    check(inputs(b=1, s=256, heads=(4, 2, 4, 2)))
    assert sum(scored) / 2 < 0.6 * 256 * 256


def test_inference_needs_no_gradient_buffers() -> None:
    q_s, k_s, q_t, k_t = inputs()
    with torch.no_grad():
        value = attention_kl(q_s.requires_grad_(), k_s, q_t, k_t)
    assert not value.requires_grad
    torch.testing.assert_close(value, reference(q_s.detach(), k_s, q_t, k_t))


def test_only_keys_or_only_queries_need_gradients() -> None:
    q_s, k_s, q_t, k_t = inputs()
    attention_kl(q_s, k_s.requires_grad_(), q_t, k_t).backward()
    assert k_s.grad.abs().sum() > 0
    assert q_s.grad is None


def test_second_derivative_is_refused() -> None:
    q_s, k_s, q_t, k_t = inputs()
    value = attention_kl(q_s.requires_grad_(), k_s, q_t, k_t)
    (gradient,) = torch.autograd.grad(value**2, q_s, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_activation_checkpointing() -> None:
    q_s, k_s, q_t, k_t = inputs()
    grads = []
    for checkpoint in (False, True):
        q, k = q_s.clone().requires_grad_(), k_s.clone().requires_grad_()

        def loss(q, k):
            return attention_kl(q * 2, k.sin(), q_t, k_t)

        value = torch.utils.checkpoint.checkpoint(loss, q, k, use_reentrant=False) if checkpoint else loss(q, k)
        (2 * value).backward()
        grads.append((value.detach(), q.grad, k.grad))
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.equal(plain, checkpointed)


def test_impl() -> None:
    tensors = inputs()
    with pytest.raises(RuntimeError, match="impl='triton' cannot run here: .+"):
        attention_kl(*tensors, impl="triton")
    with pytest.raises(ValueError, match="impl must be"):
        attention_kl(*tensors, impl="cuda")
    assert attention_kl(*tensors, impl="auto") == attention_kl(*tensors, impl="torch")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "jsd"}, "found 'jsd'"),
        ({"temperature": 0.0}, "temperature must be positive, found 0.0"),
        ({"window": 0}, "window must be at least 1"),
        ({"window": 4, "causal": False}, "needs causal=True"),
        ({"row_mask": torch.ones(2, 12).bool()}, r"row_mask must be bool \(2, 13\), found torch.bool \(2, 12\)"),
        ({"key_mask": torch.ones(2, 13)}, "found torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 5, 13])}, "cu_seqlens must rise from 0 to 26"),
        ({"head_map": [0, 1, 2]}, r"\[4\] or \[4, group\]"),
        ({"head_map": [0, 1, 2, 4]}, "teacher heads 0..3"),
    ],
)
def test_bad_arguments(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        attention_kl(*inputs(), **options)


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match="student has 4 attention heads and the teacher 6"):
        attention_kl(*inputs(heads=(4, 2, 6, 3)))
    with pytest.raises(ValueError, match="K dividing H"):
        attention_kl(*inputs(heads=(4, 3, 4, 4)))
    q_s, k_s, q_t, k_t = inputs()
    with pytest.raises(ValueError, match="same tokens"):
        attention_kl(q_s, k_s, q_t[:, :, :-1], k_t[:, :, :-1])


@pytest.mark.parametrize(
    ("lse", "message"),
    [
        ({"lse_student": torch.zeros(1, 4, 9)}, "come together"),
        (
            {"lse_student": torch.zeros(1, 4, 9), "lse_teacher": torch.zeros(1, 2, 9)},
            r"lse_teacher must be fp32 \[1, 4",
        ),
        ({"lse_student": torch.zeros(1, 4, 9).half(), "lse_teacher": torch.zeros(1, 4, 9)}, "lse_student must be fp32"),
    ],
)
def test_log_sum_exps_that_do_not_fit(lse, message):
    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    with pytest.raises(ValueError, match=message):
        attention_kl(q, k, q, k, **lse)
