"""Our attention function in transformers' AttentionInterface: it looks at queries and keys, then attends as before.

A model is switched to it by name. What it does with what it sees comes with the forward call, as a keyword argument
that Hugging Face models hand down to their attention; without that argument it does nothing of its own. So what a call
wants is also there when activation checkpointing repeats a layer during backward, long after the forward call.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from lightning_itk.attention.layer import LayerAttention

KEYWORD = "itk_capture"
_PREFIX = "itk_"
# Inputs of the softmax that q, k, scaling, window and soft-cap do not tell.
_UNKNOWN_TERMS = {"s_aux": "attention sinks", "position_bias": "a position bias"}


class Capture:
    """What one forward call does with the attention of its layers.

    Not a dataclass: FSDP looks into those for tensors and hands the layers a copy.
    """

    def __init__(
        self,
        layers: frozenset[int],
        use: Callable[[int, LayerAttention], Any],
        check: Callable[[int, LayerAttention, Tensor, Tensor], None] | None = None,
    ) -> None:
        self.layers, self.use, self.check = layers, use, check
        self.seen: dict[int, Any] = {}
        self.grad_enabled = False

    def see(self, module: nn.Module, q: Tensor, k: Tensor, options: Mapping[str, Any]) -> LayerAttention | None:
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise ValueError(f"{type(module).__name__} has no layer_idx: its attention cannot be told from the others")
        if layer not in self.layers:
            return None
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"attention capture: layer {layer} has {q.shape[2]} queries and {k.shape[2]} keys; "
                "call the model with use_cache=False and without prefixes"
            )
        if self.grad_enabled and not torch.is_grad_enabled():
            raise RuntimeError(
                "attention capture: a layer runs without gradients inside a training step; activation checkpointing "
                'must be non-reentrant (gradient_checkpointing_kwargs={"use_reentrant": False})'
            )
        attention = _layer_attention(module, q, k, options)
        value = self.use(layer, attention)
        # A repeated layer is activation checkpointing at work: autograd takes its saved tensors, the value is known.
        self.seen.setdefault(layer, value)
        return attention


def _layer_attention(module: nn.Module, q: Tensor, k: Tensor, options: Mapping[str, Any]) -> LayerAttention:
    for keyword, term in _UNKNOWN_TERMS.items():
        if options.get(keyword) is not None:
            raise ValueError(f"attention capture: {type(module).__name__} has {term}, which the loss cannot rebuild")
    scaling, causal = options.get("scaling"), options.get("is_causal")
    return LayerAttention(
        q=q,
        k=k,
        scaling=q.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
    )


class _As:
    """An object with some attributes replaced."""

    def __init__(self, original: Any, **replaced: Any) -> None:
        self.__dict__.update(_original=original, **replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)


def _own_attention(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The attention function a module would have called, found in the file that defines it."""
    for cls in type(module).__mro__:
        names = vars(sys.modules.get(cls.__module__, object))
        if "ALL_ATTENTION_FUNCTIONS" in names:
            eager = names.get("eager_attention_forward")
            if implementation == "eager" and eager is None:
                raise ValueError(
                    f"attention capture: {cls.__module__} has no eager_attention_forward; "
                    f'load the model of {type(module).__name__} with attn_implementation="sdpa"'
                )
            return names["ALL_ATTENTION_FUNCTIONS"].get_interface(implementation, eager)
    raise ValueError(f"attention capture: {type(module).__name__} does not use transformers.AttentionInterface")


def _attend(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """The attention function of a tapped model: see q and k if this forward call asks for it, then attend as before."""
    capture: Capture | None = options.pop(KEYWORD, None)
    attention = None
    if capture is not None:
        if implementation == "sdpa" and options.get("softcap") is not None:
            raise ValueError(f"{type(module).__name__}: sdpa ignores its soft-cap; load it with another implementation")
        attention = capture.see(module, query, key, options)
    caller: Any = module
    if "flash" in implementation:
        # Flash attention reads the implementation's name off the module's config to find its kernel.
        caller = _As(module, config=_As(module.config, _attn_implementation=implementation))
    output = _own_attention(module, implementation)(caller, query, key, value, attention_mask, **options)
    if capture is not None and capture.check is not None and attention is not None:
        capture.check(module.layer_idx, attention, value, output[0])  # type: ignore[arg-type]
    return output


def switch(config: Any) -> str | None:
    """Point a model's config at our function around its own implementation; returns the own one's name, to switch back.

    The name is set on the internal attribute, which is never saved: the public setter checks for kernels by name.
    """
    own: str | None = config._attn_implementation
    if own is None or not own.startswith(_PREFIX):
        real = own or "eager"
        AttentionInterface.register(_PREFIX + real, partial(_attend, real))
        # Without a mask function under the same name transformers makes no mask, and padding is silently seen.
        if real in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(_PREFIX + real, ALL_MASK_ATTENTION_FUNCTIONS[real])
        config._attn_implementation_internal = _PREFIX + real
    return own
