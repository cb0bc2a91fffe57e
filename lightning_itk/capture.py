"""Queries and keys of a Hugging Face model's attention layers, seen whatever attention the model really runs.

The model is switched to an attention function of ours that looks at the queries and keys (after the rotary embedding)
and then calls the one the model had: sdpa, eager, flash or flex, with that one's own mask function. What to do with
them travels with the forward call, as a keyword argument that Hugging Face models hand down to their attention. So it
is also there when activation checkpointing repeats a layer during backward, long after the forward call, and forward
calls whose backwards interleave cannot mix up. Shapes as in `attention.py`.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_PREFIX = "itk_"
_KEYWORD = "itk_capture"
_PROBE_TOKENS = 16
# Inputs of the softmax that q, k, scaling, window and soft-cap do not tell.
_UNKNOWN_TERMS = {"s_aux": "attention sinks", "position_bias": "a position bias"}


@dataclass(frozen=True)
class LayerAttention:
    """What one layer's attention map is made of: softmax(cap(scaling * q k^T)) over the visible keys."""

    q: Float[Tensor, "B H S D"]
    k: Float[Tensor, "B K S D"]
    scaling: float
    window: int | None  # keys a query sees, itself included
    softcap: float | None
    causal: bool


LayerLoss = Callable[[int, LayerAttention], Tensor]


def layer_map(
    student_layers: int, teacher_layers: int, layers: str | Collection[int] | Mapping[int, int] = "all"
) -> dict[int, int]:
    """The teacher layer that each distilled student layer answers to.

    Args:
        student_layers: the student's number of layers.
        teacher_layers: the teacher's.
        layers: "all"; "every:n" (the last of every n layers); student layers, negative ones from the end; or a map
            from student layers to teacher layers. Without a map, g(l) = round((l + 1) * teacher / student) - 1, which
            is the identity for equal depths and always ends at both last layers.

    Raises:
        ValueError: a layer that does not exist, no layer at all, or a word that is not understood.
    """
    if isinstance(layers, Mapping):
        pairs = {int(student): int(teacher) for student, teacher in layers.items()}
    else:
        if layers == "all":
            chosen = list(range(student_layers))
        elif isinstance(layers, str):
            word, _, step = layers.partition(":")
            if word != "every" or not step.isdigit() or int(step) == 0:
                raise ValueError(f'attention layers: expected "all", "every:n", a list or a map, found {layers!r}')
            chosen = list(range(int(step) - 1, student_layers, int(step)))
        else:
            chosen = [layer + student_layers if -student_layers <= layer < 0 else layer for layer in layers]
        pairs = {layer: max(0, round((layer + 1) * teacher_layers / student_layers) - 1) for layer in chosen}
    for student, teacher in pairs.items():
        for owner, layer, count in (("student", student, student_layers), ("teacher", teacher, teacher_layers)):
            # Only an explicit map names teacher layers; a derived one is out of range with its student layer.
            if not 0 <= layer < count:
                raise ValueError(f"attention layers: the {owner} has layers 0..{count - 1}, found {layer}")
    if not pairs:
        raise ValueError(f"attention layers: no student layer is chosen by {layers!r}")
    return pairs


@dataclass
class _Capture:
    """What one forward call does with the attention of its layers."""

    layers: frozenset[int] | None  # None = every layer
    use: Callable[[int, LayerAttention], Any]
    seen: dict[int, Any] = field(default_factory=dict)
    grad_enabled: bool = False
    check: Callable[[int, LayerAttention, Tensor, Tensor], None] | None = None

    def see(self, module: nn.Module, q: Tensor, k: Tensor, options: Mapping[str, Any]) -> None:
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise ValueError(f"{type(module).__name__} has no layer_idx: its attention cannot be told from the others")
        if self.layers is not None and layer not in self.layers:
            return
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
        value = self.use(layer, _layer_attention(module, q, k, options))
        # A repeated layer is activation checkpointing at work: autograd takes its saved tensors, the value is known.
        self.seen.setdefault(layer, value)


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
    capture: _Capture | None = options.pop(_KEYWORD, None)
    if capture is not None:
        if implementation == "sdpa" and options.get("softcap") is not None:
            raise ValueError(f"{type(module).__name__}: sdpa ignores its soft-cap; load it with another implementation")
        capture.see(module, query, key, options)
    caller: Any = module
    if "flash" in implementation:
        # Flash attention reads the implementation's name off the module's config to find its kernel.
        caller = _As(module, config=_As(module.config, _attn_implementation=implementation))
    output = _own_attention(module, implementation)(caller, query, key, value, attention_mask, **options)
    if capture is not None and capture.check is not None:
        capture.check(module.layer_idx, _layer_attention(module, query, key, options), value, output[0])  # type: ignore[arg-type]
    return output


class AttentionTap:
    """Access to the queries and keys of one model; made by `install`.

    Attributes:
        heads: by layer, the number of query heads; empty when the model could not be tried out (on the meta device).
    """

    def __init__(self, model: nn.Module) -> None:
        found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if found is None or found.config.is_encoder_decoder:
            raise ValueError(f"attention capture needs a decoder-only transformers model, found {type(model).__name__}")
        self.model: PreTrainedModel = found
        self.num_layers: int = found.config.get_text_config().num_hidden_layers
        self.heads: dict[int, int] = {}
        self._capture: _Capture | None = None
        self._own: list[tuple[Any, str | None]] = []
        configs = {
            id(module.config): module.config for module in found.modules() if isinstance(module, PreTrainedModel)
        }
        for config in configs.values():
            own = config._attn_implementation or "eager"
            if own.startswith(_PREFIX):
                continue
            name = _PREFIX + own
            AttentionInterface.register(name, partial(_attend, own))
            if own in ALL_MASK_ATTENTION_FUNCTIONS:
                AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
            self._own.append((config, config._attn_implementation))
            config._attn_implementation_internal = name
        self._hook = found.register_forward_pre_hook(self._hand_over, with_kwargs=True)

    def _hand_over(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self._capture is None:
            return None
        self._capture.grad_enabled = torch.is_grad_enabled()
        return args, kwargs | {_KEYWORD: self._capture}

    @contextmanager
    def record(self, layers: Collection[int] | None = None) -> Iterator[dict[int, LayerAttention]]:
        """Keep q and k of the model's next forward call, by layer. The teacher's side.

        Args:
            layers: which layers; default all.

        Raises:
            RuntimeError: at the end, when a layer was not seen.
        """
        with self._capturing(_Capture(self._checked(layers), lambda layer, attention: attention)) as seen:
            yield seen

    @contextmanager
    def attach(self, loss: LayerLoss, layers: Collection[int] | None = None) -> Iterator[dict[int, Tensor]]:
        """Take a loss of each layer's attention inside the model's next forward call. The student's side.

        The losses are plain autograd tensors: add them to what is differentiated. Each layer's temporaries are gone
        before the next layer runs, and activation checkpointing recomputes them with the layer. An identity function
        on the layer's output that injects the gradient would have to know the upstream gradient beforehand, and would
        drop the loss without a word when nothing else is differentiated.

        Args:
            loss: called with the layer's number and attention; returns a scalar. Under activation checkpointing it
                is called again during backward and must do the same.
            layers: which layers; default all.

        Raises:
            RuntimeError: at the end, when a layer was not seen; or reentrant activation checkpointing.
        """
        with self._capturing(_Capture(self._checked(layers), loss)) as seen:
            yield seen

    def _checked(self, layers: Collection[int] | None) -> frozenset[int]:
        chosen = frozenset(range(self.num_layers) if layers is None else layers)
        if not chosen <= set(range(self.num_layers)):
            raise ValueError(f"{type(self.model).__name__} has layers 0..{self.num_layers - 1}, found {sorted(chosen)}")
        return chosen

    @contextmanager
    def _capturing(self, capture: _Capture) -> Iterator[dict[int, Any]]:
        if self._capture is not None:
            raise RuntimeError("attention capture: one record or attach at a time for a model")
        self._capture = capture
        try:
            yield capture.seen
        finally:
            self._capture = None
        missing = sorted((capture.layers or frozenset()) - capture.seen.keys())
        if missing:
            raise RuntimeError(f"{type(self.model).__name__}: the attention of layers {missing} was not seen")

    def probe(self, layers: Collection[int] | None = None) -> None:
        """Run a few tokens and compare each layer's attention with the one rebuilt from q and k.

        Raises:
            ValueError: a layer was not seen exactly once, or attends differently; names the model and the layers.
        """
        name, required = type(self.model).__name__, self._checked(layers)
        counts: dict[int, int] = {}

        def check(layer: int, attention: LayerAttention, value: Tensor, output: Tensor) -> None:
            counts[layer] = counts.get(layer, 0) + 1
            self.heads[layer] = attention.q.shape[1]
            expected = _rebuild(attention, value)
            tolerance = 1e-2 if output.dtype == torch.float32 else 5e-2  # also under TF32
            agrees = (output.float() - expected).abs().max() <= tolerance * expected.abs().max()
            if not agrees or not self._window_is_known(layer, attention):
                raise ValueError(
                    f"attention capture: layer {layer} of {name} does not attend by "
                    "softmax(scaling * q k) over a causal window; the attention loss cannot serve it"
                )

        vocabulary = self.model.config.get_text_config().vocab_size
        tokens = torch.arange(_PROBE_TOKENS, device=self.model.device) % vocabulary
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            self._capture = _Capture(required, lambda layer, attention: None, check=_only(required, check))
            with torch.no_grad():
                self.model(input_ids=tokens[None], use_cache=False)
        finally:
            self._capture = None
            for module in training:
                module.training = True
        wrong = sorted(layer for layer in required if counts.get(layer, 0) != 1)
        if wrong:
            raise ValueError(
                f"attention capture: {name} shows transformers.AttentionInterface no attention, or more than one, "
                f"in layers {wrong} of {self.num_layers}; the attention loss cannot serve them"
            )

    def _window_is_known(self, layer: int, attention: LayerAttention) -> bool:
        """Whether the config expects the window that the layer told; the probe is too short to see one in the map."""
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            return attention.window == getattr(config, "sliding_window", None)
        return kinds[layer] == ("full_attention" if attention.window is None else "sliding_attention")

    def remove(self) -> None:
        """Give the model its own attention function back."""
        self._hook.remove()
        for config, own in self._own:
            config._attn_implementation_internal = own
        self._own.clear()


def _only(layers: frozenset[int], check: Callable[..., None]) -> Callable[..., None]:
    return lambda layer, *rest: check(layer, *rest) if layer in layers else None


def _rebuild(attention: LayerAttention, value: Tensor) -> Float[Tensor, "B S H D"]:
    """What attention returns without padding, from q, k and v: the probe's oracle, with its map in memory."""
    q, heads = attention.q.float(), attention.q.shape[1]
    k, v = (t.float().repeat_interleave(heads // t.shape[1], dim=1) for t in (attention.k, value))
    scores = q @ k.mT * attention.scaling
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    position = torch.arange(q.shape[2], device=q.device)
    distance = position[:, None] - position
    if attention.causal:
        scores = scores.masked_fill(distance < 0, -torch.inf)
    if attention.window is not None:
        scores = scores.masked_fill(distance >= attention.window, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def install(model: nn.Module, layers: Collection[int] | None = None) -> AttentionTap:
    """Make a model's queries and keys visible, and prove on a few tokens that they are the ones it attends with.

    Nothing of it is saved with the model, and what the model computes does not change.

    Args:
        model: a Hugging Face causal language model, or a wrapper around one (PEFT).
        layers: the layers that must be visible; default all.

    Raises:
        ValueError: a model or layer that cannot be served, by name: attention that does not go through
            `transformers.AttentionInterface`, linear attention, sinks, position biases.
    """
    tap = AttentionTap(model)
    # A model still on the meta device has no numbers to compare; record and attach report a layer that is not seen.
    offloaded = hasattr(tap.model, "hf_device_map")
    if tap.model.device.type == "meta" and not offloaded:
        return tap
    try:
        tap.probe(layers)
    except Exception:
        tap.remove()
        raise
    return tap
