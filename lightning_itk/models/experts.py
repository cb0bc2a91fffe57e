"""A student of some of a mixture's experts, or of one in each layer: then a dense model."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from lightning_itk.models.pruning import NOTE, expert_blocks, rebuilt, run_over

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # in configurations
_ROUTERS = ("gate", "router")  # beside the experts
_DENSE = {"mixtral": "mistral", "qwen3_moe": "qwen3"}  # the same layers with a plain MLP


def count_experts(model: PreTrainedModel) -> int:
    """Experts of every layer that has some.

    Raises:
        ValueError: a model without experts, or with experts that are not kept as transformers' fused ones are.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    blocks = [model.get_submodule(block) for block in expert_blocks(model).values()]
    counts = {getattr(block.experts, "num_experts", None) for block in blocks}
    if not blocks:
        raise ValueError(f"experts: {name} has none, expected a mixture of experts")
    if len(counts) != 1 or not isinstance(count := counts.pop(), int):
        raise ValueError(f"experts: {name} keeps its experts in an unknown way")
    if (getattr(config, "n_group", None) or 1) > 1:
        raise ValueError(f"experts: {name} routes to groups of experts, which cannot be cut")
    return count


@torch.no_grad()
def expert_use(model: PreTrainedModel, sequences: Iterable[np.ndarray]) -> Float[Tensor, "layers experts"]:
    """The routing weight that each expert gets, its part of a layer's whole.

    Heavy hitters are kept, as in Muzio et al., SEER-MoE, arXiv 2404.05089. Summed weights, not how often an expert is
    chosen: where a token goes to all experts of a layer (2 of 2) only they can tell them apart.

    Args:
        model: a mixture of experts.
        sequences: token ids of calibration records, one array each.

    Returns:
        One row for each layer that has experts, which adds up to 1, in fp64.

    Raises:
        ValueError: no token at all, or a router that does not hand its experts the top k of them.
    """
    count, blocks = count_experts(model), list(expert_blocks(model).values())
    sums = torch.zeros(len(blocks), count, dtype=torch.float64)

    def measure(row: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            chosen, weights = args[1:3] if len(args) == 3 else (None, None)
            if chosen is None or weights is None or chosen.shape != weights.shape or chosen.is_floating_point():
                raise ValueError(f"experts: {type(model).__name__} routes its tokens in an unknown way")
            sums[row].index_add_(0, chosen.flatten().long().cpu(), weights.flatten().double().cpu())

        return hook

    experts = [model.get_submodule(f"{block}.experts") for block in blocks]
    run_over(model, sequences, [part.register_forward_pre_hook(measure(i)) for i, part in enumerate(experts)])
    return sums / sums.sum(1, keepdim=True).clamp_min(torch.finfo(sums.dtype).tiny)


def experts_to_keep(experts: str, use: Float[Tensor, "layers experts"]) -> list[list[int]]:
    """What `prune --experts` says, as sorted expert numbers by layer that has experts.

    Args:
        experts: a number N (the N experts of each layer with the greatest use), or "dense" (the one).
        use: of every layer's experts.

    Raises:
        ValueError: what is neither, or as many experts as there are.
    """
    count = use.shape[1]
    number = 1 if experts == "dense" else int(experts) if experts.isdecimal() else 0
    if not 0 < number < count + (experts == "dense"):
        raise ValueError(f"experts: expected a number below {count}, the model's experts, or dense, found {experts!r}")
    order = torch.sort(use, dim=1, descending=True, stable=True).indices  # the earlier of equal ones stays
    return [sorted(row[:number].tolist()) for row in order]


def keep_experts(model: PreTrainedModel, kept: Sequence[Sequence[int]]) -> PreTrainedModel:
    """A mixture of some of another's experts, with copies of their weights and of their rows of the router.

    A token goes to as many experts as before, or to all that are left. The configuration notes under "pruned" which
    experts each layer has, counted in the unpruned original.

    Args:
        model: a mixture of experts; not changed.
        kept: as many experts of each layer that has some, in rising order.

    Raises:
        ValueError: a model without experts, or whose weights do not fit the smaller model.
    """
    count, blocks = count_experts(model), expert_blocks(model)
    config = copy.deepcopy(model.config)
    inner = config.get_text_config()
    for key in _COUNTS:
        if getattr(inner, key, None) == count:
            setattr(inner, key, len(kept[0]))
    inner.num_experts_per_tok = min(inner.num_experts_per_tok, len(kept[0]))
    setattr(config, NOTE, _note(model, kept))
    chosen = dict(zip(blocks.values(), kept, strict=True))
    state = {}
    for key, tensor in model.state_dict().items():
        block, part = _split(key, chosen)
        cut = part.startswith("experts.") or part.partition(".")[0] in _ROUTERS
        rows = cut and tensor.ndim and tensor.shape[0] == count
        state[key] = tensor[torch.tensor(chosen[block], device=tensor.device)] if rows else tensor
    return rebuilt(model, config, state)


def dense(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A dense model of one expert of each layer of a mixture: a Mixtral becomes a Mistral, a Qwen3-MoE a Qwen3.

    One expert as it is, not an average: experts that were trained apart have their units in different orders, so the
    mean of their weights is no mean of what they do (Li et al., MC-SMoE, arXiv 2310.01334, align them first). It gets
    the whole routing weight. The configuration notes under "pruned" which experts they were.

    Args:
        model: a mixture of experts; not changed.
        kept: by layer, its expert.

    Raises:
        ValueError: a mixture that has no dense twin in transformers, or whose dense layers have another width.
    """
    count_experts(model)
    name, old, blocks = type(model).__name__, model.config, expert_blocks(model)
    kind = _DENSE.get(old.model_type)
    if kind is None:
        raise ValueError(f"experts: {name} has no dense form, only {', '.join(_DENSE)} do; name a number of experts")
    width = getattr(old, "moe_intermediate_size", old.intermediate_size)
    if len(blocks) < old.num_hidden_layers and width != old.intermediate_size:
        raise ValueError(
            f"experts: {name}'s experts are {width} wide and its dense layers {old.intermediate_size}: "
            "no dense model has both"
        )
    config = AutoConfig.for_model(kind)
    taken = {key: value for key, value in old.to_dict().items() if hasattr(config, key)}
    for key in ("model_type", "architectures", "transformers_version", "layer_types", "intermediate_size"):
        taken.pop(key, None)
    head_dim = getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
    taken |= {"head_dim": head_dim, "intermediate_size": width, NOTE: _note(model, [[expert] for expert in kept])}
    if kind == "qwen3":
        taken["max_window_layers"] = 0  # all layers of a mixture see the same window
    config = AutoConfig.for_model(kind, **taken)
    config._attn_implementation = old._attn_implementation
    return rebuilt(model, config, dict(_dense_state(model, dict(zip(blocks.values(), kept, strict=True)))))


def _dense_state(model: PreTrainedModel, chosen: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in model.state_dict().items():
        block, part = _split(key, chosen)
        if part == "experts.gate_up_proj":
            gate, up = tensor[chosen[block]].chunk(2)
            yield f"{block}.gate_proj.weight", gate
            yield f"{block}.up_proj.weight", up
        elif part == "experts.down_proj":
            yield f"{block}.down_proj.weight", tensor[chosen[block]]
        elif part.partition(".")[0] not in _ROUTERS:
            yield key, tensor


def _split(key: str, blocks: Iterable[str]) -> tuple[str, str]:
    """The block of experts that a weight is in, and its name there; empty where it is in none."""
    block = next((block for block in blocks if key.startswith(f"{block}.")), "")
    return block, key.removeprefix(f"{block}.") if block else ""


def _note(model: PreTrainedModel, kept: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What is noted of a student: its layers, and by layer its experts, both counted in the unpruned original."""
    depth, rows = model.config.get_text_config().num_hidden_layers, iter(kept)
    noted = getattr(model.config, NOTE, None) or {"layers": list(range(depth)), "of": depth}
    by_layer = [list(next(rows)) if layer in expert_blocks(model) else None for layer in range(depth)]
    for layer, before in enumerate(noted.get("experts", ())):
        if before is not None:
            by_layer[layer] = [before[expert] for expert in by_layer[layer] or ()]
    return {**noted, "experts": by_layer, "experts_of": noted.get("experts_of", count_experts(model))}
