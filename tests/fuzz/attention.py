"""`attention_kl` against whole maps in fp64."""

import math
from typing import Any

import torch
from fuzz import comparison
from fuzz.comparison import Leaf, compare, dtypes, size
from hypothesis import strategies as st
from torch import Tensor

from lightning_itk.attention import attention_kl


def maps(data: st.DataObject) -> None:
    """Any heads, groups, windows, segments and masks."""
    draw = data.draw
    batch, length = (
        draw(st.integers(0, 3), label="batch"),
        draw(st.sampled_from([0, 1, 2, 7, 16, 17, 33]), label="length"),
    )
    sizes = {}
    student_heads = draw(st.sampled_from([1, 2, 4, 6]), label="student's heads")
    teacher_heads = draw(st.sampled_from([student_heads, 2 * student_heads, 1]), label="teacher's heads")
    for name, heads in (("student", student_heads), ("teacher", teacher_heads)):
        divisors = [d for d in range(1, heads + 1) if heads % d == 0]
        keys, dim = draw(st.sampled_from(divisors), label=f"{name}'s key heads"), size(draw, f"{name}'s dim", 1)
        dtype = dtypes(draw, f"{name}'s dtype")
        sizes[name] = [
            Leaf(draw, f"{name} {what}", (batch, count, length, dim), dtype)
            for what, count in (("q", heads), ("k", keys))
        ]
    causal = draw(st.booleans(), label="causal")
    options: dict[str, Any] = {
        "causal": causal,
        "window": draw(st.none() | st.integers(1, 40), label="window") if causal else None,
        "kind": draw(st.sampled_from(["forward", "reverse"]), label="kind"),
        "temperature": draw(st.sampled_from([1.0, 2.0, 0.7]), label="temperature"),
        "softcap_student": draw(st.sampled_from([None, None, 3.0]), label="student's soft-cap"),
        "softcap_teacher": draw(st.sampled_from([None, None, 3.0]), label="teacher's soft-cap"),
        "key_mask": draw(st.none() | st.floats(0, 1), label="keys"),
        "row_mask": draw(st.none() | st.floats(0, 1), label="query rows"),
    }
    for name in ("key_mask", "row_mask"):
        if options[name] is not None:
            options[name] = torch.rand(batch, length) < options[name]
    total, bounds = batch * length, None
    if total and draw(st.booleans(), label="segments"):
        inside = draw(st.sets(st.integers(1, total), max_size=5), label="bounds")
        bounds = torch.tensor(sorted({0, total} | inside), dtype=torch.int32)
    groups = draw(
        st.none() | st.lists(st.integers(0, teacher_heads - 1), min_size=student_heads, max_size=student_heads),
        label="head_map",
    )

    def ours() -> Tensor:
        inputs = [leaf() for pair in sizes.values() for leaf in pair]
        return attention_kl(*inputs, cu_seqlens=bounds, head_map=groups, impl=comparison.IMPL, **options)

    def truth() -> Tensor:
        found = [
            _log_map(q(True), k(True), options, bounds, options[f"softcap_{name}"]) for name, (q, k) in sizes.items()
        ]
        (log_q, seen), (log_p, _) = found
        return _sum(log_q, log_p.detach(), seen, options, groups)

    scale = 1.0 + total * max(math.sqrt(q().shape[-1]) for q, _ in sizes.values())
    compare(draw, sizes["student"], ours, truth, scale, sizes["teacher"], autocast=False)  # which rounds q and k


def _log_map(
    q: Tensor, k: Tensor, options: dict[str, Any], bounds: Tensor | None, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, H, S, S], and which keys each row sees [B, S, S]."""
    batch, heads, length, dim = q.shape
    scores = q @ k.repeat_interleave(heads // k.shape[1], 1).transpose(-1, -2) * dim**-0.5
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    place = torch.arange(length)
    ahead = place[:, None] - place[None, :]
    seen = torch.ones(batch, length, length, dtype=torch.bool)
    if options["causal"]:
        seen &= ahead >= 0
    if options["window"] is not None:
        seen &= ahead < options["window"]
    if bounds is not None:
        segment = torch.bucketize(torch.arange(batch * length), bounds[1:].long(), right=True).view(batch, length)
        seen &= segment[:, :, None] == segment[:, None, :]
    if options["key_mask"] is not None:
        seen &= options["key_mask"][:, None, :]
    scores = (scores / options["temperature"]).masked_fill(~seen[:, None], -math.inf)
    scores = scores.masked_fill(~seen.any(-1)[:, None, :, None], 0.0)  # rows that see nothing are dropped in `_sum`
    return scores.log_softmax(-1) if length else scores, seen


def _sum(log_q: Tensor, log_p: Tensor, seen: Tensor, options: dict[str, Any], groups: list[int] | None) -> Tensor:
    heads, teacher_heads = log_q.shape[1], log_p.shape[1]
    if groups is not None:
        pairs = [(h, [t]) for h, t in enumerate(groups)]
    elif teacher_heads >= heads:
        share = teacher_heads // heads
        pairs = [(h, list(range(h * share, (h + 1) * share))) for h in range(heads)]
    else:
        pairs = [(h, [h // (heads // teacher_heads)]) for h in range(heads)]
    rows = seen.any(-1)
    if options["row_mask"] is not None:
        rows = rows & options["row_mask"]
    total = log_q.sum() * 0 if torch.isfinite(log_q).all() else log_q[:, :, :0].sum()
    for h, ours in pairs:
        for t in ours:
            a, b = (log_p[:, t], log_q[:, h]) if options["kind"] == "forward" else (log_q[:, h], log_p[:, t])
            difference = (a.masked_fill(~seen, 0.0) - b.masked_fill(~seen, 0.0)) * seen
            kl = (a.masked_fill(~seen, -math.inf).exp() * difference).sum(-1)
            total = total + kl[rows].sum() / (len(ours) * heads)
    return total
