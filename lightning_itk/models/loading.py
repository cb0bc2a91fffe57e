"""Load a causal LM from a folder or hub name, and refuse what would train on garbage."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass
class LoRA:
    """Low-rank adapters (Hu et al., arXiv 2106.09685), through peft.

    Args:
        r: rank.
        alpha: the adapter's output is multiplied by alpha / r.
        dropout: on the adapter's input.
        target_modules: names of the layers to adapt, or "all-linear" (every linear layer but the head).
        modules_to_save: layers that are trained in full beside the adapters.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] = field(default_factory=list)


def load_causal_lm(
    name: str,
    *,
    dtype: DType = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    model_kwargs: dict | None = None,
) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, with missing weights as an error.

    Args:
        name: folder or hub name.
        dtype: "auto" keeps the checkpoint's.
        model_kwargs: more arguments for `from_pretrained`, e.g. `device_map` or `quantization_config`.

    Raises:
        ValueError: a folder that does not exist or holds no complete model; one line that says what is missing.
    """
    check_folder(name)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **(model_kwargs or {}),
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ValueError(f"model {name!r} cannot be loaded: {first_line(error)}") from error
    model, info = cast(tuple[PreTrainedModel, dict], loaded)
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ValueError(
            f"model {name!r} has {len(missing)} missing or mismatched weights (first: {missing[0]}); "
            "they would be random, so the checkpoint is refused"
        )
    return model


def add_lora(model: PreTrainedModel, lora: LoRA) -> torch.nn.Module:
    """The model with trainable adapters; everything else is frozen."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("LoRA needs the `peft` extra: pip install 'lightning-itk[peft]'") from error
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save or None,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"LoRA cannot be added to {type(model).__name__}: {first_line(error)}") from error


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained` with a one-line error."""
    check_folder(name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        raise ValueError(f"no tokenizer can be loaded from {name!r}: {first_line(error)}") from error


def first_difference(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """How two tokenizers differ, at the first token id where they do; None when they agree on every common token.

    A longer padded vocabulary is not a difference: only ids that carry a token in both are compared, and one
    tokenizer's tokens must be a prefix of the other's.
    """
    names = [{index: token for token, index in t.get_vocab().items()} for t in (a, b)]
    for index in sorted(names[0].keys() & names[1].keys()):
        if names[0][index] != names[1][index]:
            return f"token {index} is {names[0][index]!r} in one and {names[1][index]!r} in the other"
    for mine, other in (names, names[::-1]):
        extra = sorted(mine.keys() - other.keys())
        if extra and extra[0] < max(other):
            return f"token {extra[0]} ({mine[extra[0]]!r}) exists in only one of them"
    probe = "Hello, wörld!  1234\n\tdef f(x): return x"
    ids = [t(probe, add_special_tokens=False)["input_ids"] for t in (a, b)]
    if ids[0] != ids[1]:
        return f"they share a vocabulary but split {probe!r} into {ids[0][:8]}… and {ids[1][:8]}…"
    return None


def check_folder(name: str) -> None:
    """Refuse what looks like a folder and does not exist, before it is taken for a hub name."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).expanduser().exists():
        raise ValueError(f"folder {name!r} does not exist")


def first_line(error: Exception) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
