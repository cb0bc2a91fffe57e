"""The torch engine of the attention loss as one operator: a call that torch.compile neither opens nor breaks at.

Which query rows count, and where segments end, is looked up on the host inside it. Eager code calls the same functions
as an `autograd.Function`, as `losses/operators.py` does.
"""

import torch
from torch import Tensor

from lightning_itk.attention.layer import LayerAttention, Masks
from lightning_itk.attention.tiled import Rows, Scores, group_heads, losses_and_gradients
from lightning_itk.losses.chunked import scaled
from lightning_itk.losses.divergence import Kind


def tiled_attention_kl(
    student: LayerAttention,
    teacher: LayerAttention,
    masks: Masks,
    *,
    kind: Kind,
    temperature: float,
    head_map: Tensor | None,
) -> Tensor:
    """`kl.layer_attention_kl` in plain torch, with everything resolved and checked; differentiable once."""
    run = tiled_attention_loss if torch.compiler.is_compiling() else _TiledAttentionLoss.apply
    with_gradient = torch.is_grad_enabled() and (student.q.requires_grad or student.k.requires_grad)
    scores = (student.scaling, student.softcap, teacher.scaling, teacher.softcap)
    layers = (student.q, student.k, teacher.q, teacher.k)
    return run(
        *layers, *masks, head_map, *scores, student.causal, student.window, kind, float(temperature), with_gradient
    )[0]


def _tiled_attention_loss(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    row_mask: Tensor | None,
    head_map: Tensor | None,
    scale_s: float,
    cap_s: float | None,
    scale_t: float,
    cap_t: float | None,
    causal: bool,
    window: int | None,
    kind: str,
    temperature: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and its gradients by q_s and k_s, empty if not wanted; those of fp16 in fp32."""
    rows = Rows.of(q_s.shape[0], q_s.shape[2], causal, window, Masks(cu_seqlens, key_mask, row_mask))
    head_map = group_heads(q_s.shape[1], q_t.shape[1]) if head_map is None else head_map.cpu()
    scores = Scores(scale_s, cap_s, temperature), Scores(scale_t, cap_t, temperature)
    total, dq, dk = losses_and_gradients(
        q_s,
        k_s,
        q_t,
        k_t,
        *scores,
        rows,
        head_map,
        kind,  # type: ignore[arg-type]
        with_gradient,
    )
    return total, total.new_empty(0) if dq is None else dq, total.new_empty(0) if dk is None else dk


tiled_attention_loss = torch.library.custom_op(
    "lightning_itk::tiled_attention_loss",
    _tiled_attention_loss,
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe,),
)


@tiled_attention_loss.register_fake
def _(q_s, k_s, *rest):  # type: ignore[no-untyped-def]
    wide = torch.float64 if q_s.dtype == torch.float64 else torch.float32
    stored = torch.float32 if q_s.dtype == torch.float16 else q_s.dtype
    total = q_s.new_empty((), dtype=wide)
    if not rest[-1]:
        return total, total.new_empty(0), total.new_empty(0)
    return total, torch.empty_like(q_s, dtype=stored), torch.empty_like(k_s, dtype=stored)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


@torch.autograd.function.once_differentiable
def _backward(ctx, upstream, *_):  # type: ignore[no-untyped-def]
    if upstream is None:
        return (None,) * 17
    saved = zip(ctx.saved_tensors, ctx.needs_input_grad, ctx.dtypes, strict=False)
    return *(scaled(g, upstream, dtype) if needed else None for g, needed, dtype in saved), *(None,) * 15


tiled_attention_loss.register_autograd(_backward, setup_context=_setup)


class _TiledAttentionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        output = _tiled_attention_loss(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)  # type: ignore[assignment]
