"""What a training loop is given: models, samples, optimizer steps."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

IGNORE = -100


@dataclasses.dataclass
class Job:
    """What a loop is to do. Models are `{"folder": …}` or `{"config": …, "seed": …}`, with `layers` to keep of them."""

    provider: str
    method: str  # sft or kd
    precision: str  # by Lightning's names: 32-true, bf16-mixed or bf16-true
    device: str
    student: dict[str, Any]
    teacher: dict[str, Any]
    samples: str  # file
    gradient: str  # file to write
    batch: int
    accumulate: int
    steps: int
    warmup: int = 2  # steps that get no time


class Example(NamedTuple):
    """Token ids, of which those from `start` on are the response."""

    ids: np.ndarray
    start: int

    def labels(self) -> np.ndarray:
        return np.where(np.arange(len(self.ids)) < self.start, IGNORE, self.ids)


def write_examples(path: Path, examples: list[Example]) -> None:
    lengths = np.array([[len(e.ids), e.start] for e in examples])
    np.savez(path, ids=np.concatenate([e.ids for e in examples], dtype=np.int64), lengths=lengths)


def read_examples(path: str) -> list[Example]:
    with np.load(path) as file:
        ids = np.split(file["ids"], np.cumsum(file["lengths"][:-1, 0]))
        return [Example(i, int(start)) for i, start in zip(ids, file["lengths"][:, 1], strict=True)]


def load(spec: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """A causal LM that `Job` describes; random weights are the same ones every time."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if spec.get("folder"):
        model = AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=dtype, attn_implementation="sdpa")
    else:
        torch.manual_seed(spec["seed"])
        model = LlamaForCausalLM(LlamaConfig(**spec["config"], tie_word_embeddings=True, attn_implementation="sdpa"))
    model.config.use_cache = False
    if spec.get("layers"):
        decoder = model.get_decoder()
        keep = np.linspace(0, len(decoder.layers) - 1, spec["layers"]).round().astype(int)
        decoder.layers = torch.nn.ModuleList(decoder.layers[i] for i in keep)
        model.config.num_hidden_layers = spec["layers"]
    return model.to(device, dtype)
