"""KL between the attention maps of a student and a teacher, from their queries and keys, without holding a map.

The forward pass is one sweep over the scores and saves one log-sum-exp per row and head; the backward pass recomputes
the scores in two deterministic kernels (no atomics), one for dq and one for dk; one for both is an option (README.md).
"""

import torch
from torch import Tensor

from .attention_forward import EMPTY
from .attention_problem import Problem, both_gradients, forward, key_gradient, query_gradient
from .launch import LOG2E, attention_refusal, eager


def attention_kl(
    q_student: Tensor,
    k_student: Tensor,
    q_teacher: Tensor,
    k_teacher: Tensor,
    *,
    scale_student: float,
    scale_teacher: float,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
    row_mask: Tensor | None = None,
    kind: str = "forward",
    temperature: float = 1.0,
    head_map: Tensor | None = None,
    softcap_student: float | None = None,
    softcap_teacher: float | None = None,
    lse_student: Tensor | None = None,
    lse_teacher: Tensor | None = None,
) -> Tensor:
    """Sum over kept query rows of the mean over student heads of KL(teacher map || student map).

    Args:
        q_student, k_student: [B, Hs, S, Ds], [B, Hs / any, S, Ds]; last dimension contiguous, any other stride.
        q_teacher, k_teacher: [B, Ht, S, Dt], [B, Ht / any, S, Dt]; never get gradients. Under autocast all four are
            cast to its dtype; else, where one model is in fp32, the other is cast up.
        scale_student, scale_teacher: factor on q · k.
        causal: a query sees no later key.
        window: keys that a query sees, itself included; needs causal.
        cu_seqlens: int32 or int64 [segments + 1], boundaries that rise from 0 to B · S over the tokens laid end to end.
            Tokens attend within their segment; the end of a batch row always ends a segment. Not looked at here, as
            that waits for the GPU: `lightning_itk.attention` does, once per batch.
        key_mask, row_mask: bool [B, S]; keys that may be seen, query rows that count. A row that sees no key counts 0.
        kind: "forward" or "reverse" (KL(student map || teacher map)).
        temperature: divides both scores; no T² here.
        head_map: int64 [Hs, G], the teacher heads that each student head answers to; a row's value is the mean over
            them. Default: consecutive groups, where one head count divides the other.
        softcap_student, softcap_teacher: c · tanh(score / c) before the temperature.
        lse_student, lse_teacher: [B, Hs, S], [B, Ht, S], natural log-sum-exp of exactly these scores (scaled, capped,
            masked, divided by the temperature), if the model's own attention has them: both or neither. Saves a
            forward sweep when gradients are needed and kind is "forward".

    Returns:
        fp32 scalar.
    """
    dim = max(q_student.shape[-1], q_teacher.shape[-1])
    reason = attention_refusal(q_student.device, dim)
    if reason is not None:
        raise ValueError(reason)
    q_s, k_s = _heads("student", q_student, k_student)
    q_t, k_t = _heads("teacher", q_teacher.detach(), k_teacher.detach())
    if q_s.element_size() != q_t.element_size():  # exact, and every tile of the tables is for one element size
        q_s, k_s, q_t, k_t = (x.to(torch.promote_types(q_s.dtype, q_t.dtype)) for x in (q_s, k_s, q_t, k_t))
    batch, heads, length = q_s.shape[:3]
    if q_t.shape[0] != batch or q_t.shape[2] != length:
        raise ValueError(f"attention_kl: student and teacher differ in batch or length: {q_s.shape} and {q_t.shape}")
    if kind not in ("forward", "reverse"):
        raise ValueError(f"attention_kl: the kernels know kind forward and reverse, found {kind!r}")
    if not temperature > 0:
        raise ValueError(f"attention_kl: temperature must be positive, found {temperature}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"attention_kl: window must be positive and needs causal=True, found {window}, {causal}")
    for name, mask in (("key_mask", key_mask), ("row_mask", row_mask)):
        if mask is not None and (mask.shape != (batch, length) or mask.dtype != torch.bool):
            raise ValueError(f"attention_kl: {name} must be bool [{batch}, {length}], found {mask.dtype} {mask.shape}")
    if (lse_student is None) != (lse_teacher is None):
        raise ValueError("attention_kl: lse_student and lse_teacher come together or not at all")
    head_map, fixed = _head_map(head_map, heads, k_s.shape[1], q_t.shape[1], k_t.shape[1], q_s.device)
    given: tuple[Tensor, ...] = ()
    if lse_student is not None and lse_teacher is not None:
        given = (_log2(lse_student, row_mask), _log2(lse_teacher[:, head_map], row_mask))
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (q_s, k_s)]
    run = _AttentionLoss.apply if eager(q_s) else attention_loss
    return run(
        q_s, k_s, q_t, k_t,
        head_map.to(torch.int32).contiguous(),
        None if cu_seqlens is None else segments(cu_seqlens.to(q_s.device), batch, length),
        None if key_mask is None else key_mask.contiguous().view(torch.uint8),
        None if row_mask is None else row_mask.contiguous().view(torch.uint8),
        *(given if given and kind == "forward" and wanted[0] else (None, None)),
        float(scale_student), float(scale_teacher), softcap_student, softcap_teacher,
        causal, window or 0, kind == "reverse", float(temperature), fixed, *wanted,
    )[0]  # fmt: skip


def _heads(name: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Check one model's queries and keys."""
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention_kl: {name} q and k must be [B, H, S, D] and [B, Hkv, S, D] with Hkv dividing H, "
            f"found {list(q.shape)} and {list(k.shape)}"
        )
    if torch.is_autocast_enabled(q.device.type):  # as `scaled_dot_product_attention` does
        q, k = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k))
    if q.dtype != k.dtype or q.dtype == torch.float64:
        raise ValueError(f"attention_kl: {name} q is {q.dtype} and k {k.dtype}, expected one dtype of at most fp32")
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))  # type: ignore[return-value]


def _head_map(
    head_map: Tensor | None, hs: int, hs_kv: int, ht: int, ht_kv: int, device: torch.device
) -> tuple[Tensor, bool]:
    """[Hs, G] and whether all pairs of a student key head share one teacher key head by construction."""
    if head_map is not None:
        if head_map.ndim != 2 or head_map.shape[0] != hs:
            raise ValueError(f"attention_kl: head_map must be [{hs}, G], found {list(head_map.shape)}")
        return head_map.to(device, non_blocking=True), False  # a copy from the host must not wait for the device
    if ht % hs == 0:
        groups = torch.arange(ht, device=device).view(hs, ht // hs)
    elif hs % ht == 0:
        groups = torch.arange(hs, device=device)[:, None] // (hs // ht)
    else:
        raise ValueError(f"attention_kl: {hs} student and {ht} teacher heads do not divide; give a head_map")
    return groups, ht_kv <= hs_kv and hs_kv % ht_kv == 0


def _log2(lse: Tensor, row_mask: Tensor | None) -> Tensor:
    """A caller's natural log-sum-exps in the kernels' convention: log2, EMPTY where the row drops out."""
    lse = lse.detach().float() * LOG2E.value
    usable = lse.abs() < 1e29
    if row_mask is not None:
        usable = usable & row_mask.view(row_mask.shape[0], *(1,) * (lse.ndim - 2), row_mask.shape[1])
    return torch.where(usable, lse, EMPTY.value).contiguous()


def segments(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """First and past-the-end position of each token's segment within its batch row: int32 [2, B, S]."""
    tokens = torch.arange(batch * length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    index = torch.searchsorted(cu_seqlens, tokens, right=True)
    starts = torch.cat([cu_seqlens.new_zeros(1), cu_seqlens])[index]
    ends = torch.cat([cu_seqlens, cu_seqlens.new_full((1,), batch * length)])[index]
    row = tokens // length * length
    bounds = torch.stack([torch.maximum(starts, row) - row, torch.minimum(ends, row + length) - row])
    return bounds.to(torch.int32).view(2, batch, length)


# The arguments of both operators, in the order of `Problem`'s fields.
OPERANDS = "Tensor q_s, Tensor k_s, Tensor q_t, Tensor k_t, Tensor head_map"
OPERANDS += ", Tensor? spans, Tensor? key_mask, Tensor? row_mask"
OPTIONS = "float scale_s, float scale_t, float? cap_s, float? cap_t, bool causal, int window, bool reverse"
OPTIONS += ", float temperature, bool fixed, bool want_q, bool want_k"
LOSS = f"({OPERANDS}, Tensor? lse_s, Tensor? lse_t, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
BACKWARD = f"(Tensor upstream, {OPERANDS}, Tensor kl, Tensor lse_s, Tensor lse_t, {OPTIONS}) -> (Tensor, Tensor)"


def _attention_loss(*arguments):  # type: ignore[no-untyped-def]
    """Loss, KL rows, lse_s, lse_t, and dq for upstream 1 if the caller's log-sum-exps made it free (else empty)."""
    *operands, lse_s, lse_t = arguments[:10]
    p = Problem(*operands, *arguments[10:-2])
    q_s = p.q_s
    if lse_s is not None and lse_t is not None:
        lse_s, lse_t = lse_s.clone(), lse_t.clone()  # an op's outputs may not be its inputs
        kl = torch.empty(q_s.shape[:3], dtype=torch.float32, device=q_s.device)
        dq = query_gradient(p, kl, lse_s, lse_t, None)
    else:
        kl, lse_s, lse_t = forward(p)
        dq = q_s.new_empty(0)
    return kl.sum() / q_s.shape[1], kl, lse_s, lse_t, dq


attention_loss = torch.library.custom_op("lightning_itk::attention_loss", _attention_loss, mutates_args=(), schema=LOSS)


@attention_loss.register_fake
def _(q_s, k_s, q_t, k_t, head_map, spans, key_mask, row_mask, lse_s, *rest):  # type: ignore[no-untyped-def]
    batch, heads, length = q_s.shape[:3]
    kl = torch.empty(batch, heads, length, dtype=torch.float32, device=q_s.device)
    lse_t = torch.empty(batch, heads, head_map.shape[1], length, dtype=torch.float32, device=q_s.device)
    dq = torch.empty((0,) if lse_s is None else q_s.shape, dtype=q_s.dtype, device=q_s.device)
    return kl.new_empty(()), kl, torch.empty_like(kl), lse_t, dq


def _attention_backward(upstream, *arguments):  # type: ignore[no-untyped-def]
    """dq and dk (empty where not wanted)."""
    *operands, kl, lse_s, lse_t = arguments[:11]
    *options, want_q, want_k = arguments[11:]
    p = Problem(*operands, *options)
    if want_q and want_k:
        return both_gradients(p, kl, lse_s, lse_t, upstream)
    dq = query_gradient(p, kl, lse_s, lse_t, upstream) if want_q else p.q_s.new_empty(0)
    dk = key_gradient(p, kl, lse_s, lse_t, upstream) if want_k else p.k_s.new_empty(0)
    return dq, dk


attention_backward = torch.library.custom_op(
    "lightning_itk::attention_backward", _attention_backward, mutates_args=(), schema=BACKWARD
)


@attention_backward.register_fake
def _(upstream, q_s, k_s, *rest):  # type: ignore[no-untyped-def]
    shapes = [x.shape if wanted else (0,) for x, wanted in zip((q_s, k_s), rest[-2:], strict=True)]
    return tuple(torch.empty(s, dtype=x.dtype, device=x.device) for s, x in zip(shapes, (q_s, k_s), strict=True))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, kl, lse_s, lse_t, dq = output
    ctx.options = inputs[10:]
    ctx.has_dq = inputs[8] is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8], kl, lse_s, lse_t, dq)


@torch.autograd.function.once_differentiable
def _backward(ctx, upstream, *_):  # type: ignore[no-untyped-def]
    if upstream is None:
        return (None,) * 21
    *saved, ready = ctx.saved_tensors
    *options, want_q, want_k = ctx.options
    run = _attention_backward if eager(upstream) else attention_backward
    dq, dk = run(upstream, *saved, *options, want_q and not ctx.has_dq, want_k)
    if ctx.has_dq:
        dq = ready * upstream
    return (dq if want_q else None, dk if want_k else None, *(None,) * 19)


attention_loss.register_autograd(_backward, setup_context=_setup)


class _AttentionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        output = _attention_loss(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)  # type: ignore[assignment]
