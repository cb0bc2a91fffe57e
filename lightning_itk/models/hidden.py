"""Hidden states through the front door: run a whole causal LM, but stop short of its logits.

The model is called as a whole, so that DDP, FSDP and checkpointing hooks fire; a pre-hook on the output embeddings
takes the head's input and hands the head no positions to work on.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from lightning_itk.batch import Batch, Sample, is_packed, model_inputs, pack, pad, real_tokens, unpack
from lightning_itk.losses.chunked import Head, project

# Where configurations say what happens to logits after the output layer; anything else is found by `check_head`.
_SOFTCAP = "final_logit_softcapping"
_DIVISOR = "logits_scaling"
_FACTOR = "logit_scale"


class HiddenStates(NamedTuple):
    states: Float[Tensor, "B S H"]  # the head's input
    head: Head


class RoutedStates(HiddenStates):
    """The states of a mixture of experts, with what its routers said."""

    router_logits: tuple[Float[Tensor, "B*S experts"], ...]  # by layer that has experts


def base_causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value, operator]


def head_of(model: torch.nn.Module) -> Head:
    """The output layer of a causal LM as plain tensors, live parameters included.

    Raises:
        ValueError: a head that is not one matrix: an adapter on it, or a quantised weight.
    """
    base = base_causal_lm(model)
    layer, config, name = base.get_output_embeddings(), base.config.get_text_config(), type(base).__name__
    if layer is None:
        raise ValueError(f"{name} has no output embeddings: it is not a causal language model this kit can train")
    layer = _active(layer)
    weight = getattr(layer, "weight", None)
    if hasattr(layer, "lora_A") or type(layer).__module__.startswith("peft.tuners"):
        raise ValueError(
            f"{name}: a LoRA adapter on the output layer is not supported; leave it out of target_modules "
            "(modules_to_save trains the whole layer)"
        )
    if weight is None or not weight.is_floating_point() or weight.ndim != 2:
        raise ValueError(f"{name}: the output layer {type(layer).__name__} has no plain floating-point weight")
    scale = getattr(config, _FACTOR, None) or 1.0
    scale = scale / (getattr(config, _DIVISOR, None) or 1.0)
    return Head(weight, getattr(layer, "bias", None), float(scale), getattr(config, _SOFTCAP, None))


def _active(layer: torch.nn.Module) -> torch.nn.Module:
    """peft's modules_to_save keeps the trained copy of a layer beside the original."""
    copies, adapters = getattr(layer, "modules_to_save", None), getattr(layer, "active_adapters", None)
    return copies[adapters[0]] if copies is not None and adapters else layer


def hidden_states(model: torch.nn.Module, batch: Batch, *, routers: bool = False) -> HiddenStates:
    """Run the model on a batch up to its head. Gradients flow where they are enabled.

    With `routers` the result is `RoutedStates`; such a model has passed `check_routers`.
    """
    taken: list[Tensor] = []

    def take(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        taken.append(args[0])
        return (args[0][..., :0, :], *args[1:])

    layer = _active(base_causal_lm(model).get_output_embeddings())
    handle = layer.register_forward_pre_hook(take)
    try:
        asked = {"output_router_logits": True} if routers else {}
        output = model(**_causal_inputs(model, batch), use_cache=False, **asked)
    finally:
        handle.remove()
    if not routers:
        return HiddenStates(taken[0], head_of(model))
    states = RoutedStates(taken[0], head_of(model))
    states.router_logits = output.router_logits
    return states


def _causal_inputs(model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
    """No token sees the padding to its right, so a causal model needs no mask for it. transformers would wait for the
    device, twice in every run of a model, to find out whether it can do without."""
    if is_packed(batch) or not getattr(base_causal_lm(model).config, "is_causal", True):
        return model_inputs(batch)
    return {"input_ids": batch["input_ids"]}


@torch.no_grad()
def check_head(model: torch.nn.Module) -> None:
    """Prove on four tokens that `hidden_states` and `head_of` make the model's own logits.

    Raises:
        ValueError: a model that does something else to its logits, by name.
    """
    base = base_causal_lm(model)
    layer = base.get_output_embeddings()
    if layer is None:
        head_of(model)  # raises
    training = model.training
    model.eval()
    batch = _probe(base, [4])
    try:
        expected = model(**model_inputs(batch), use_cache=False).logits[0].float()
        states, head = hidden_states(model, batch)
        actual = project(states[0], head.prepared(states[0]))
    finally:
        model.train(training)
    tolerance = 1e-4 if states.dtype in (torch.float32, torch.float64) else 0.05
    error = (actual.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    if not error < tolerance:
        raise ValueError(
            f"{type(base).__name__} does something to its logits that this kit does not know "
            f"(relative difference {error:.1e}); it cannot be trained without silent errors"
        )


@torch.no_grad()
def check_routers(model: torch.nn.Module) -> None:
    """Prove on four tokens that the model shows the logits of its routers.

    Raises:
        ValueError: a model without them, by name, or one that shows something else.
    """
    base, training = base_causal_lm(model), model.training
    name, config = type(base).__name__, base.config.get_text_config()
    if not getattr(config, "num_experts_per_tok", None) or not hasattr(config, "output_router_logits"):
        raise ValueError(f"{name} has no routers with a load-balancing loss: router_weight must be null or 0")
    model.eval()
    try:
        found = hidden_states(model, _probe(base, [4]), routers=True)
    finally:
        model.train(training)
    assert isinstance(found, RoutedStates)
    # A model of another version may show probabilities there.
    shown = [logits for logits in found.router_logits or () if logits.ndim == 2 and len(logits) == 4]
    if not shown or any(((t >= 0) & (t <= 1)).all() and (t.float().sum(-1) - 1).abs().max() < 1e-2 for t in shown):
        raise ValueError(f"{name} does not show its routers' logits: router_weight must be 0")


@torch.no_grad()
def check_packing(model: torch.nn.Module) -> None:
    """Prove on two short samples that the model keeps packed samples apart.

    Raises:
        ValueError: a model that lets packed samples see each other, by name.
    """
    base, training = base_causal_lm(model), model.training
    model.eval()
    packed = _probe(base, [5, 3])
    padded = unpack(packed)
    try:
        with torch.autocast(packed["input_ids"].device.type, enabled=False):  # the weights' own precision can tell
            together = hidden_states(model, packed).states[0]
            apart = hidden_states(model, padded).states[real_tokens(padded)]
    finally:
        model.train(training)
    tolerance = 1e-3 if together.dtype in (torch.float32, torch.float64) else 0.1
    error = (together - apart).abs().max() / apart.abs().max().clamp_min(1e-6)
    if not error < tolerance:
        raise ValueError(
            f"{type(base).__name__} lets packed samples see each other (relative difference {error:.1e}); "
            "set packing: false"
        )


def _probe(base: PreTrainedModel, lengths: list[int]) -> Batch:
    """A tiny packed batch of arbitrary tokens; a single sample is a padded batch."""
    samples, vocab = [], base.config.get_text_config().vocab_size
    for index, length in enumerate(lengths):
        ids = (np.arange(length) + 7 * index + 1) % vocab
        samples.append(Sample(ids, ids, index))
    batch = pack([samples], pad_id=0) if len(samples) > 1 else pad(samples, pad_id=0)
    device = next(base.parameters()).device
    return Batch(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})  # type: ignore[typeddict-item]
