"""A smaller student out of a model: some of its layers, chosen by their influence, and nothing else changed."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

# The key of the student's configuration: {"layers": kept, "of": layers of the original}; of a mixture's student also
# {"experts": by layer those that are kept (null where there were none), "experts_of": experts of the original}.
NOTE = "pruned"


def layers_to_keep(layers: str, count: int, influence: Callable[[], Sequence[float]] | None = None) -> list[int]:
    """What `prune --layers` says, as sorted layer numbers.

    Args:
        layers: a number N (the N layers of greatest influence), "every:N" (the last of every N layers, as in
            `attention.layers`), or layers by number ("0,1,5"; negative ones count from the end; "7," is layer 7).
        count: layers of the model.
        influence: finds every layer's influence; asked for a number only.

    Raises:
        ValueError: what is none of these, or a layer that does not exist.
    """
    text = layers.replace(" ", "")
    expected = f"layers: expected a number below {count}, every:N or layers by number (0,1,5), found {layers!r}"
    word, _, step = text.partition(":")
    if word == "every" and step.isdigit() and 1 < int(step) <= count:
        return list(range(int(step) - 1, count, int(step)))
    if text.isdigit():
        if not 0 < int(text) < count:
            raise ValueError(expected)
        if influence is None:
            raise ValueError(f"layers: {text} layers are chosen by their influence on records: name some (data)")
        order = np.argsort(-np.asarray(influence()), kind="stable")  # the earlier of equal ones stays
        return sorted(order[: int(text)].tolist())
    try:
        numbers = [int(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        raise ValueError(expected) from None
    kept = sorted({number + count if number < 0 else number for number in numbers})
    if not all(0 <= number < count for number in kept):
        raise ValueError(f"layers: the model has layers 0..{count - 1}, found {layers!r}")
    if len(kept) != len(numbers):
        raise ValueError(f"layers: a layer is named twice in {layers!r}")
    return kept


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name of a causal LM's list of layers, and the list.

    Raises:
        ValueError: a model that keeps its layers in another way.
    """
    count = model.config.get_text_config().num_hidden_layers
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} has {len(found)} lists of {count} layers, expected one: cannot prune")
    return found[0]


@torch.no_grad()
def block_influence(model: PreTrainedModel, sequences: Iterable[np.ndarray]) -> list[float]:
    """How much each layer turns its input: 1 - cosine(input, output), the mean over all tokens.

    Men et al., ShortGPT, arXiv 2403.03853, equation 1. The sums are fp64, the model runs as it is.

    Args:
        model: a causal LM.
        sequences: token ids of calibration records, one array each.

    Returns:
        One number of [0, 2] per layer.

    Raises:
        ValueError: no token at all.
    """
    _, layers = decoder_layers(model)
    sums = torch.zeros(len(layers), dtype=torch.float64)

    def measure(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before: Float[Tensor, "1 S H"] = args[0] if args else kwargs["hidden_states"]
            after: Float[Tensor, "1 S H"] = output[0] if isinstance(output, tuple) else output
            cosine = torch.cosine_similarity(before.double(), after.double(), dim=-1)
            sums[index] += (1 - cosine).sum().cpu()

        return hook

    handles = [layer.register_forward_hook(measure(i), with_kwargs=True) for i, layer in enumerate(layers)]
    tokens = run_over(model, sequences, handles)
    return (sums / tokens).tolist()


def run_over(model: PreTrainedModel, sequences: Iterable[np.ndarray], handles: Iterable[RemovableHandle]) -> int:
    """Run a model on token ids, one array at a time, and remove the hooks that watched; the number of tokens.

    Raises:
        ValueError: no token at all.
    """
    tokens, training = 0, model.training
    model.eval()
    try:
        for ids in sequences:
            model(input_ids=torch.as_tensor(ids, device=model.device)[None].long(), use_cache=False)
            tokens += len(ids)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not tokens:
        raise ValueError("data: holds no token to measure the model on")
    return tokens


def expert_blocks(model: PreTrainedModel) -> dict[int, str]:
    """The layers that hold experts, fused as transformers keeps them, and the name of each one's block of them."""
    name, _ = decoder_layers(model)
    found: dict[int, str] = {}
    for block, module in model.named_modules():
        if block.startswith(f"{name}.") and isinstance(getattr(module, "experts", None), nn.Module):
            found[int(block.removeprefix(f"{name}.").partition(".")[0])] = block
    return found


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A model of some of another's layers, with copies of their weights; all else stays as it was.

    Its configuration notes under "pruned" which layers it has, counted in the unpruned original, and of how many.

    Args:
        model: a causal LM; not changed.
        kept: layers in rising order.

    Raises:
        ValueError: a model that keeps its layers in an unknown way, or whose weights do not fit the smaller model.
    """
    name, layers = decoder_layers(model)
    before = len(layers)
    config = copy.deepcopy(model.config)
    inner = config.get_text_config()
    for key, value in list(inner.to_dict().items()):
        if isinstance(value, list) and len(value) == before:  # layer_types and the like
            setattr(inner, key, [value[layer] for layer in kept])
    inner.num_hidden_layers = len(kept)
    noted = getattr(config, NOTE, None) or {"layers": list(range(before)), "of": before}
    noted = {**noted, "layers": [noted["layers"][layer] for layer in kept]}
    if "experts" in noted:
        noted["experts"] = [noted["experts"][layer] for layer in kept]
    setattr(config, NOTE, noted)
    if hasattr(inner, "mlp_only_layers"):  # which of a mixture's layers are dense, by number and by rhythm
        inner.mlp_only_layers = [place for place, layer in enumerate(kept) if layer not in expert_blocks(model)]
        inner.decoder_sparse_step = 1
    return rebuilt(model, config, dict(_renamed(model, f"{name}.", kept)))


def rebuilt(model: PreTrainedModel, config: Any, state: dict[str, Tensor]) -> PreTrainedModel:
    """A model of another configuration with copies of these weights; all else is as in `model`.

    Raises:
        ValueError: weights that do not fit.
    """
    same = type(config) is type(model.config)
    with _default_dtype(model.dtype):
        smaller: Any = (type(model) if same else cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING)[type(config)])(config)
    own = {key: tensor.shape for key, tensor in smaller.state_dict().items()}
    wrong = sorted(own.keys() ^ state.keys()) or sorted(key for key in own if own[key] != state[key].shape)
    if wrong:
        raise ValueError(f"{type(model).__name__} cannot be pruned so: {wrong[0]} does not fit the smaller model")
    smaller.load_state_dict(state)
    smaller.tie_weights()
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.train(model.training)


def original_layers(config: Any, depth: int) -> list[int] | None:
    """The layers of its original that a student has; None where it was not pruned from a model of `depth` layers."""
    noted = getattr(config, NOTE, None)
    return list(noted["layers"]) if isinstance(noted, dict) and noted.get("of") == depth else None


def _renamed(model: PreTrainedModel, prefix: str, kept: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    places = {layer: place for place, layer in enumerate(kept)}
    for key, tensor in model.state_dict().items():
        if not key.startswith(prefix):
            yield key, tensor
            continue
        number, _, rest = key.removeprefix(prefix).partition(".")
        if int(number) in places:
            yield f"{prefix}{places[int(number)]}.{rest}", tensor


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
