"""Load a causal LM from a folder or hub name, and refuse what would train on garbage."""

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_itk.gguf import DAMAGED, located, make_plain, whole_weights
from lightning_itk.hub import check_folder, first_line, reason
from lightning_itk.models.checkpoint import keep_out_of_checkpoints
from lightning_itk.models.sharded_loading import LOADING_ERRORS, defer, real_adapters

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


class MissingWeights(ValueError):
    """A checkpoint that does not fill its model; `first` is a weight that it lacks."""

    def __init__(self, message: str, first: str) -> None:
        super().__init__(message)
        self.first = first


def load_model(
    auto: Any,
    name: str,
    *,
    dtype: DType = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    model_kwargs: dict | None = None,
) -> PreTrainedModel:
    """`from_pretrained` of an auto class of transformers, with missing weights as an error. Within `deferred_loading`
    the weights come later, where they can be read by rows.

    Args:
        auto: AutoModelForCausalLM, AutoModelForSequenceClassification, …
        name: folder, hub name, or a `.gguf` file; its weights are read whole.
        dtype: "auto" keeps the checkpoint's.
        model_kwargs: more arguments for `from_pretrained`, e.g. `revision`, `gguf_file`, `quantization_config`.

    Raises:
        ValueError: a folder that does not exist or holds no complete model; one line that says what is missing.
    """
    check_folder(name)
    given = dict(model_kwargs or {})
    if own := sorted(given.keys() & {"dtype", "attn_implementation", "trust_remote_code", "output_loading_info"}):
        raise ValueError(f"model {name!r}: {own[0]} is no further argument for from_pretrained: it has an option")
    where = located(name, given.pop("gguf_file", None))
    if packed := "gguf_file" in where:
        given = {**whole_weights(), **given}
    path = where.pop("pretrained_model_name_or_path")
    loading = {
        **where,
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        **given,
    }
    try:
        if (deferred := defer(auto, path, loading)) is not None:
            return deferred
        loaded = auto.from_pretrained(path, output_loading_info=True, **loading)
    except (*LOADING_ERRORS, *DAMAGED) as error:
        raise ValueError(f"model {name!r} cannot be loaded: {reason(error)}") from error
    model, info = cast(tuple[PreTrainedModel, dict], loaded)
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise MissingWeights(
            f"model {name!r} has {len(missing)} missing or mismatched weights (first: {missing[0]}); "
            "they would be random, so the checkpoint is refused",
            missing[0],
        )
    if packed and "quantization_config" not in (model_kwargs or {}):
        make_plain(model, name)
    return model


load_causal_lm = partial(load_model, AutoModelForCausalLM)


def check_student_kwargs(kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    """Arguments for a student's `from_pretrained`; refuses `device_map`, because the Trainer places what it trains."""
    if kwargs and "device_map" in kwargs:
        raise ValueError("student_kwargs.device_map: the Trainer places the student (trainer.devices); leave it out")
    return kwargs


def weights_hash(model: PreTrainedModel, name: str) -> str:
    """A hash of a model's weights and buffers; of the files in the folder `name` where some are not in memory.

    Sharded weights are gathered one after the other, on all ranks at once; their hash is that of whole ones.
    """
    found = hashlib.blake2b(digest_size=16)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    if any(tensor.is_meta for tensor in tensors.values()):
        found.update(name.encode())
        for path in sorted(path for path in Path(name).expanduser().glob("*") if path.is_file()):
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "blake2b").digest())
        return found.hexdigest()
    for key, tensor in sorted(tensors.items()):
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


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
        with real_adapters(model, lora.modules_to_save):
            return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"LoRA cannot be added to {type(model).__name__}: {first_line(error)}") from error


def make_trainable(
    model: PreTrainedModel, lora: LoRA | dict[str, Any] | None, *, gradient_checkpointing: bool, compile: bool
) -> torch.nn.Module:
    """The model as it is trained: with adapters, with activations recomputed in backward, with its decoder compiled."""
    trained: torch.nn.Module = model
    if lora is not None:
        trained = add_lora(model, LoRA(**lora) if isinstance(lora, dict) else lora)
        keep_out_of_checkpoints(trained, frozen_only=True)
    if gradient_checkpointing:
        # Non-reentrant: side effects of a layer's forward, such as the attention loss, keep their graph.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        if lora is not None:
            model.enable_input_require_grads()
    if compile:
        model.get_decoder().compile()
    return trained
