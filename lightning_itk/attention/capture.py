"""Queries and keys of a Hugging Face model's attention layers, seen whatever attention the model really runs.

`install` switches a model to an attention function that also looks at the queries and keys (after the rotary embedding)
and then calls the one the model had: sdpa, eager, flash or flex, see `interface.py`. Shapes as in `kl.py`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_itk.attention.interface import KEYWORD, Capture, LayerAttention, switch

_PROBE_TOKENS = 16

LayerLoss = Callable[[int, LayerAttention], Tensor]


def layer_map(
    student_layers: int,
    teacher_layers: int,
    layers: str | Collection[int] | Mapping[int, int] = "all",
    original: Sequence[int] | None = None,
) -> dict[int, int]:
    """The teacher layer that each distilled student layer answers to.

    Args:
        student_layers: the student's number of layers.
        teacher_layers: the teacher's.
        layers: "all"; "every:n" (the last of every n layers); student layers, negative ones from the end; or a map
            from student layers to teacher layers. Without a map, g(l) = round((l + 1) * teacher / student) - 1, which
            is the identity for equal depths and always ends at both last layers.
        original: by student layer, the teacher layer that it once was, where the student was pruned from a model of
            the teacher's depth; takes g's place.

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
            if not chosen:
                raise ValueError(
                    f"attention layers: {layers!r} takes the last of every {int(step)} layers, and the student has "
                    f"{student_layers}"
                )
        else:
            chosen = [layer + student_layers if -student_layers <= layer < 0 else layer for layer in layers]
        usual = [max(0, round((layer + 1) * teacher_layers / student_layers) - 1) for layer in range(student_layers)]
        partner = dict(enumerate(original or usual))
        pairs = {layer: partner.get(layer, -1) for layer in chosen}
    for student, teacher in pairs.items():
        for owner, layer, count in (("student", student, student_layers), ("teacher", teacher, teacher_layers)):
            # Only an explicit map names teacher layers; a derived one is out of range with its student layer.
            if not 0 <= layer < count:
                raise ValueError(f"attention layers: the {owner} has layers 0..{count - 1}, found {layer}")
    if not pairs:
        raise ValueError(f"attention layers: no student layer is chosen by {layers!r}")
    return pairs


class AttentionTap:
    """Access to the queries and keys of one model; made by `install`.

    Attributes:
        num_layers: the model's number of layers.
        attention: the attention implementation that the model really runs.
        heads: by layer, the number of query heads; empty when the model could not be tried out (on the meta device).
        head_dims: by layer, the head dimension; likewise.
        packed_rows: how many packed rows a batch may have: 0 where the model ignores that positions restart, 1 for
            the flash kernels, 2 = any number. Models let samples see each other beyond that, without a word.
    """

    def __init__(self, model: nn.Module) -> None:
        found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if found is None or found.config.is_encoder_decoder:
            raise ValueError(f"attention capture needs a decoder-only transformers model, found {type(model).__name__}")
        self.model: PreTrainedModel = found
        self._outermost = model  # whom FSDP2 wants to be called
        self.num_layers: int = found.config.get_text_config().num_hidden_layers
        self.attention: str = (found.config._attn_implementation or "eager").removeprefix("itk_")
        self.heads: dict[int, int] = {}
        self.head_dims: dict[int, int] = {}
        self.packed_rows = 0
        self._capture: Capture | None = None
        self._own: list[tuple[Any, str | None]] = []
        models = (module for module in found.modules() if isinstance(module, PreTrainedModel))
        for config in {id(module.config): module.config for module in models}.values():
            self._own.append((config, switch(config)))
        self._hook = found.register_forward_pre_hook(self._hand_over, with_kwargs=True)

    def _hand_over(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self._capture is None:
            return None
        if (
            self._capture.check is None
            and kwargs.get("attention_mask") is None
            and kwargs.get("position_ids") is not None
        ):
            self._refuse_blind_packing(kwargs["position_ids"])
        self._capture.grad_enabled = torch.is_grad_enabled()
        return args, kwargs | {KEYWORD: self._capture}

    def _refuse_blind_packing(self, positions: Tensor) -> None:
        if min(positions.shape[0], 2) > self.packed_rows and not bool((positions.diff(dim=1) > 0).all()):
            raise ValueError(
                f"{type(self.model).__name__} with {self.attention} attention lets packed samples see each other "
                f"in a batch of {positions.shape[0]} rows; "
                + ("pack into one row" if self.packed_rows else "use padded batches")
            )

    @contextmanager
    def record(self, layers: Collection[int] | None = None) -> Iterator[dict[int, LayerAttention]]:
        """Keep q and k of the model's next forward call, by layer, under autocast in its dtype. The teacher's side.

        Args:
            layers: which layers; default all.

        Raises:
            RuntimeError: at the end, when a layer was not seen.
        """
        # Under autocast half the bytes wait for the student's pass.
        with self._capturing(Capture(self._checked(layers), lambda layer, attention: attention.autocast())) as seen:
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
        with self._capturing(Capture(self._checked(layers), loss)) as seen:
            yield seen

    def _checked(self, layers: Collection[int] | None) -> frozenset[int]:
        chosen = frozenset(range(self.num_layers) if layers is None else layers)
        if not chosen <= set(range(self.num_layers)):
            raise ValueError(f"{type(self.model).__name__} has layers 0..{self.num_layers - 1}, found {sorted(chosen)}")
        return chosen

    @contextmanager
    def _capturing(self, capture: Capture) -> Iterator[dict[int, Any]]:
        if self._capture is not None:
            raise RuntimeError("attention capture: one record or attach at a time for a model")
        self._capture = capture
        try:
            yield capture.seen
        finally:
            self._capture = None
        missing = sorted(capture.layers - capture.seen.keys())
        if missing:
            raise RuntimeError(f"{type(self.model).__name__}: the attention of layers {missing} was not seen")

    def probe(self, layers: Collection[int] | None = None) -> None:
        """Run a few tokens and compare each layer's attention with the one rebuilt from q and k.

        Raises:
            ValueError: a layer was not seen exactly once, or attends differently; names the model and the layers.
        """
        name, required = type(self.model).__name__, self._checked(layers)
        position = torch.arange(_PROBE_TOKENS, device=self.model.device)
        verdicts = self._run(required, position[None])
        wrong = sorted(layer for layer in required if len(verdicts[layer]) != 1)
        if wrong:
            raise ValueError(
                f"attention capture: {name} shows transformers.AttentionInterface no attention, or more than one, "
                f"in layers {wrong} of {self.num_layers}; the attention loss cannot serve them"
            )
        wrong = sorted(layer for layer in required if not verdicts[layer][0])
        if wrong:
            raise ValueError(
                f"attention capture: layers {wrong} of {name} do not attend by softmax(scaling * q k) over a causal "
                "window; the attention loss cannot serve them"
            )
        for rows in (1, 2):
            packed = self._run(required, (position % (_PROBE_TOKENS // 2)).expand(rows, -1))
            if all(all(verdict) for verdict in packed.values()):
                self.packed_rows = rows

    def _run(self, layers: frozenset[int], positions: Tensor) -> dict[int, list[bool]]:
        """For every call of a layer's attention: does it attend as what was captured of it says?"""
        verdicts: dict[int, list[bool]] = {layer: [] for layer in layers}

        def check(layer: int, attention: LayerAttention, value: Tensor, output: Tensor) -> None:
            self.heads[layer], self.head_dims[layer] = attention.q.shape[1], attention.q.shape[3]
            expected = _rebuild(attention, value, positions)
            tolerance = 1e-2 if output.dtype == torch.float32 else 5e-2  # also under TF32
            agrees = bool((output.float() - expected).abs().max() <= tolerance * expected.abs().max())
            verdicts[layer].append(agrees and self._window_is_known(layer, attention))

        tokens = torch.arange(_PROBE_TOKENS, device=positions.device) % self.model.config.get_text_config().vocab_size
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        self._capture = Capture(layers, lambda layer, attention: None, check=check)
        try:
            with torch.no_grad():
                self._outermost(input_ids=tokens.expand(positions.shape), position_ids=positions, use_cache=False)
        finally:
            self._capture = None
            for module in training:
                module.training = True
        return verdicts

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


def _rebuild(attention: LayerAttention, value: Tensor, positions: Tensor) -> Float[Tensor, "B S H D"]:
    """What attention returns from q, k and v, segments starting at position 0: the probe's oracle, maps in memory."""
    q, heads = attention.q.float(), attention.q.shape[1]
    k, v = (t.float().repeat_interleave(heads // t.shape[1], dim=1) for t in (attention.k, value))
    scores = q @ k.mT * attention.scaling
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    segment = (positions == 0).cumsum(1)[:, None]
    scores = scores.masked_fill(segment[..., None] != segment[..., None, :], -torch.inf)
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
        tap.packed_rows = 1 if "flash" in tap.attention else 2
        return tap
    try:
        tap.probe(layers)
    except Exception:
        tap.remove()
        raise
    return tap
