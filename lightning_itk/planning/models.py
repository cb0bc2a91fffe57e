"""Models without numbers: made from their config.json under fake tensors, as shallow as their layers allow."""

from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_itk.hub import first_line, load_config
from lightning_itk.models.pruning import NOTE

_LEAST = 3  # layers: the first, the last, and one between


class Depth(NamedTuple):
    """How many decoder layers a model has, and two depths that tell what a layer costs."""

    whole: int
    short: int
    longer: int


def read_config(name: str, trust_remote_code: bool = False, model_kwargs: dict[str, Any] | None = None) -> Any:
    """The configuration of a model, from its folder or the hub's cache on this machine; nothing is downloaded.

    Raises:
        ValueError: there is none; one line.
    """
    where = {**(model_kwargs or {}), "local_files_only": True}
    try:
        return load_config(name, trust_remote_code=trust_remote_code, model_kwargs=where)
    except ValueError as error:
        reason = f"no config.json of {name!r} on this machine (a folder, or the cache of the hub)"
        raise ValueError(f"{reason}: {first_line(error)[:200]}") from error


def depths(config: Any, every: int = 1, teacher: bool = False) -> Depth:
    """Depths to simulate: whole periods of the pattern of a model's layers, and of `every` n-th layer. A teacher's are
    a period deeper, so that it is never shallower than its student."""
    text = config.get_text_config()
    whole, kinds = text.num_hidden_layers, getattr(text, "layer_types", None) or [""]
    period = next(n for n in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds, kinds[n:], strict=False)))
    period *= every
    dense = getattr(text, "first_k_dense_replace", None) or 0
    short = dense + -(-_LEAST // period) * period + (period if teacher else 0)
    longer = short + period
    return Depth(whole, whole, whole) if longer >= whole else Depth(whole, short, longer)


def shallow_model(
    name: str,
    layers: int,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    model_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """The model of a folder or hub name with its first layers only and no numbers in it; call it under fake tensors."""
    config = read_config(name, trust_remote_code, model_kwargs)
    text = config.get_text_config()
    if layers < text.num_hidden_layers:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        if hasattr(config, NOTE):
            delattr(config, NOTE)
    kept = getattr(config, "dtype", None) or torch.float32
    # Flash attention's own packages need a GPU to be imported; sdpa keeps the same tensors.
    chosen = "sdpa" if attn_implementation and "flash" in attn_implementation else attn_implementation
    return AutoModelForCausalLM.from_config(
        config,
        dtype=kept if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=chosen,
        trust_remote_code=trust_remote_code,
    )
