"""Segment boundaries of packed rows, looked at once before any engine reads them."""

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_right: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # boundaries -> (their version, number of tokens)


def check_boundaries(cu_seqlens: Int[Tensor, "segments+1"], tokens: int) -> None:
    """Refuse boundaries that do not rise from 0 to the number of tokens.

    Looking at values waits for a GPU, and all layers of a batch come with the same tensor: one that was found right is
    not looked at again until it is changed. Inside torch.compile the same is asserted on the device.

    Args:
        cu_seqlens: int32 or int64; two neighbours may be equal (an empty segment).
        tokens: B * S.

    Raises:
        ValueError: what was found instead (RuntimeError inside torch.compile).
    """
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            "attention_kl: cu_seqlens must be int32 or int64 of shape [segments + 1], found "
            f"{str(cu_seqlens.dtype).removeprefix('torch.')} {list(cu_seqlens.shape)}"
        )
    if torch.compiler.is_compiling():  # a number in the message would make a graph for every length
        torch._assert_async(_rise(cu_seqlens, tokens), "attention_kl: cu_seqlens must rise from 0 to B * S")
        return
    expected = f"attention_kl: cu_seqlens must rise from 0 to {tokens}"
    # Inference tensors count no versions; nothing in a forward pass changes its boundaries.
    seen = (None if cu_seqlens.is_inference() else cu_seqlens._version, tokens)
    if _right.get(cu_seqlens) == seen:
        return
    if not _rise(cu_seqlens, tokens):
        raise ValueError(f"{expected}, found {_shown(cu_seqlens.tolist())}")
    _right[cu_seqlens] = seen


def _rise(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Bool, on the tensor's own device: one wait for a caller who looks."""
    return (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens[1:] >= cu_seqlens[:-1]).all()


def _shown(values: list[int]) -> str:
    """The ends of a list, and the first fall in it."""
    fall = next((i for i in range(1, len(values)) if values[i] < values[i - 1]), None)
    ends = f"{values}" if len(values) <= 8 else f"[{str(values[:3])[1:-1]}, ..., {str(values[-3:])[1:-1]}]"
    return ends if fall is None else f"{ends} with {values[fall]} after {values[fall - 1]}"
