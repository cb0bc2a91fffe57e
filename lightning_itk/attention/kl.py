"""The attention loss: the divergence between two models' attention maps, computed from queries and keys.

Shapes: B rows, S positions, H query heads, K key heads (K divides H), D head dimension. Suffixes `_s` and `_t` are the
student and the teacher, which may differ in H, K and D. This file checks and dispatches; the torch implementation is in
`tiled.py`, the Triton one in `kernels/attention.py`.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_itk.attention.boundaries import check_boundaries
from lightning_itk.attention.layer import LayerAttention, Masks
from lightning_itk.attention.operators import tiled_attention_kl
from lightning_itk.losses.implementation import Impl, resolve_impl

Kind = Literal["forward", "reverse"]


def attention_kl(
    q_student: Float[Tensor, "B Hs S Ds"],
    k_student: Float[Tensor, "B Ks S Ds"],
    q_teacher: Float[Tensor, "B Ht S Dt"],
    k_teacher: Float[Tensor, "B Kt S Dt"],
    *,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Int[Tensor, "segments+1"] | None = None,
    key_mask: Bool[Tensor, "B S"] | None = None,
    row_mask: Bool[Tensor, "B S"] | None = None,
    kind: Kind = "forward",
    temperature: float = 1.0,
    head_map: Int[Tensor, "Hs G"] | Int[Tensor, "Hs"] | list | None = None,
    softcap_student: float | None = None,
    softcap_teacher: float | None = None,
    lse_student: Float[Tensor, "B Hs S"] | None = None,
    lse_teacher: Float[Tensor, "B Ht S"] | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, ""]:
    """Sum over query rows of the mean over student heads of KL(teacher's attention row || student's attention row).

    The attention term of "A Teacher Is Worth A Million Instructions" (arXiv 2406.19112), without its mean over rows.
    Scores, softmaxes and gradients are in fp32 (fp64 for fp64 inputs) whatever the input dtype. Under autocast queries
    and keys are first rounded to its dtype, as `scaled_dot_product_attention` does (fp64 is not). The teacher gets no
    gradient. A row that sees no key counts 0.

    Args:
        q_student: student queries after the rotary embedding.
        k_student: student keys; their head count divides that of the queries (grouped-query attention).
        q_teacher: teacher queries.
        k_teacher: teacher keys.
        scale_student: what the student multiplies its scores with; default 1 / sqrt(Ds).
        scale_teacher: the same for the teacher; default 1 / sqrt(Dt).
        causal: a query sees no key after itself.
        window: how many keys a query sees, itself included (Hugging Face's `sliding_window`); needs `causal`.
        cu_seqlens: int32 or int64 boundaries of the segments over the flattened B * S tokens, rising from 0 to B * S.
            Tokens attend within their segment only; the end of a row always ends a segment. A tensor on a GPU is waited
            for once, so give every layer the same one.
        key_mask: False on keys that nobody sees (padding).
        row_mask: False on query rows that do not count; rows of the response, shifted like the labels, are True.
        kind: "forward" = KL(teacher || student), "reverse" = KL(student || teacher).
        temperature: both score matrices are divided by it; the loss is not multiplied by its square.
        head_map: teacher head(s) that each student head answers to. Default: consecutive groups, when one head count
            divides the other. Several teacher heads per student head: the mean of the pairwise divergences.
        softcap_student: scores become cap * tanh(scores / cap) before the masks (Gemma 2).
        softcap_teacher: the same for the teacher.
        lse_student: fp32, the natural log of the sum over the visible keys of exp(score / temperature), scores scaled
            and capped: what flash attention returns beside its output, at temperature 1 and under the same masks. Given
            for both models it saves Triton a sweep over the scores where a gradient of kind "forward" is wanted. It is
            believed: one of other scores gives another loss. -inf drops a row. Torch makes its own.
        lse_teacher: the same for the teacher.
        impl: "triton", "torch", or "auto": Triton on a GPU that supports it, torch elsewhere.

    Returns:
        The sum, a scalar; differentiable once with respect to the student's queries and keys.

    Raises:
        ValueError: shapes that do not fit, head counts that do not divide, boundaries that do not rise from 0 to B * S,
            an unknown kind, a temperature or window that is not positive, or log-sum-exps of one model only or of
            another shape or dtype.
        RuntimeError: `impl="triton"` where Triton cannot run; the message says why.
    """
    scale_student, scale_teacher = (
        q.shape[-1] ** -0.5 if scale is None else scale
        for q, scale in ((q_student, scale_student), (q_teacher, scale_teacher))
    )
    student = LayerAttention(q_student, k_student, scale_student, window, softcap_student, causal)
    teacher = LayerAttention(q_teacher, k_teacher, scale_teacher, window, softcap_teacher, causal)
    masks = Masks(cu_seqlens, key_mask, row_mask)
    how: dict[str, Any] = {"kind": kind, "temperature": temperature, "head_map": head_map, "impl": impl}
    return layer_attention_kl(student, teacher, masks, lse=(lse_student, lse_teacher), **how)


def layer_attention_kl(
    student: LayerAttention,
    teacher: LayerAttention,
    masks: Masks,
    *,
    kind: Kind = "forward",
    temperature: float = 1.0,
    head_map: Tensor | list | None = None,
    lse: tuple[Tensor | None, Tensor | None] = (None, None),
    impl: Impl = "auto",
) -> Float[Tensor, ""]:
    """`attention_kl` of two layers as they were captured.

    Raises:
        ValueError: see `attention_kl`; or the layers see different keys.
    """
    _check_shapes(student, teacher, masks)
    _check_lse(lse, student, teacher)
    student, teacher = student.autocast(), teacher.autocast()
    window, causal = _common_window(student, teacher), student.causal
    if kind not in ("forward", "reverse"):
        raise ValueError(f'attention_kl: kind must be "forward" or "reverse", found {kind!r}')
    if not temperature > 0:
        raise ValueError(f"attention_kl: temperature must be positive, found {temperature}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(
            f"attention_kl: window must be at least 1 and needs causal=True, found window={window}, {causal=}"
        )
    if masks.cu_seqlens is not None:
        check_boundaries(masks.cu_seqlens, student.q.shape[0] * student.q.shape[2])
    # None stays None: the kernels have faster tiles for heads that pair by construction.
    index = None if head_map is None else _checked_head_map(head_map, student.q.shape[1], teacher.q.shape[1])
    student, teacher = replace(student, window=window), replace(teacher, q=teacher.q.detach(), k=teacher.k.detach())
    how: dict[str, Any] = {"kind": kind, "temperature": temperature, "head_map": index}
    widest = student.q if student.q.element_size() >= teacher.q.element_size() else teacher.q
    if resolve_impl(impl, widest, head_dim=max(student.q.shape[-1], teacher.q.shape[-1])) == "triton":
        from lightning_itk.kernels.attention import attention_kl as triton_attention_kl

        return triton_attention_kl(
            student.q,
            student.k,
            teacher.q,
            teacher.k,
            scale_student=student.scaling,
            scale_teacher=teacher.scaling,
            softcap_student=student.softcap,
            softcap_teacher=teacher.softcap,
            causal=causal,
            window=window,
            lse_student=lse[0],
            lse_teacher=lse[1],
            **masks._asdict(),
            **how,
        )
    return tiled_attention_kl(student, teacher, masks, **how)


def _common_window(student: LayerAttention, teacher: LayerAttention) -> int | None:
    """The keys that both maps cover; windows that are wider than the batch do not matter."""
    length = student.q.shape[2]
    windows = {None if w is None or w >= length else w for w in (student.window, teacher.window)}
    if len(windows) > 1 or student.causal != teacher.causal:
        raise ValueError(
            f"attention loss: a student layer sees {student.window or 'all'} keys and its teacher layer "
            f"{teacher.window or 'all'}; their maps cannot be compared, so leave the layer out of attention.layers"
        )
    return windows.pop()


def _checked_head_map(head_map: Tensor | list, student_heads: int, teacher_heads: int) -> Tensor:
    compiling = torch.compiler.is_compiling()
    index = torch.as_tensor(head_map)
    index = index if compiling else index.cpu()
    index = index[:, None] if index.dim() == 1 else index
    if index.dim() != 2 or index.shape[0] != student_heads or index.shape[1] == 0 or index.is_floating_point():
        raise ValueError(
            f"head_map must hold integers [{student_heads}] or [{student_heads}, group], one row per student head; "
            f"found {index.dtype} {tuple(index.shape)}"
        )
    fits = (index.min() >= 0) & (index.max() < teacher_heads)
    if compiling:  # asserted on its device, as boundaries are
        torch._assert_async(fits, f"head_map must name teacher heads 0..{teacher_heads - 1}")
    elif not fits:
        raise ValueError(f"head_map must name teacher heads 0..{teacher_heads - 1}, found {index.tolist()}")
    return index.long()


def _check_lse(lse: tuple[Tensor | None, Tensor | None], student: LayerAttention, teacher: LayerAttention) -> None:
    if (lse[0] is None) != (lse[1] is None):
        raise ValueError("attention_kl: lse_student and lse_teacher come together or not at all")
    for name, given, layer in zip(("lse_student", "lse_teacher"), lse, (student, teacher), strict=True):
        if given is not None and (given.shape != layer.q.shape[:3] or given.dtype != torch.float32):
            expected = f"fp32 {list(layer.q.shape[:3])}"
            raise ValueError(f"attention_kl: {name} must be {expected}, found {given.dtype} {list(given.shape)}")


def _check_shapes(student: LayerAttention, teacher: LayerAttention, masks: Masks) -> None:
    for name, q, k in (("student", student.q, student.k), ("teacher", teacher.q, teacher.k)):
        fits = q.dim() == k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
        if not fits or q.shape[1] % k.shape[1]:
            raise ValueError(
                f"attention_kl: {name} queries [B, H, S, D] and keys [B, K, S, D] must agree with K dividing H; "
                f"found {tuple(q.shape)} and {tuple(k.shape)}"
            )
    tokens, others = ((layer.q.shape[0], layer.q.shape[2]) for layer in (student, teacher))
    if tokens != others:
        raise ValueError(
            f"attention_kl: student and teacher must see the same tokens; found [B, S] = {tokens} and {others}"
        )
    for name, mask in (("key_mask", masks.key_mask), ("row_mask", masks.row_mask)):
        if mask is not None and (tuple(mask.shape) != tokens or mask.dtype != torch.bool):
            raise ValueError(f"attention_kl: {name} must be bool {tokens}, found {mask.dtype} {tuple(mask.shape)}")
