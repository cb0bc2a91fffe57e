"""A teacher that ran once: its answers come from a folder that `cache-teacher` wrote."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_itk.attention.layer import LayerAttention
from lightning_itk.batch import Batch, ResponseRows, identities, real_tokens, sample_spans
from lightning_itk.cached.manifest import TOKENIZER, differences
from lightning_itk.cached.shards import Shards, joined
from lightning_itk.losses.chunked import Head
from lightning_itk.losses.topk import TopK
from lightning_itk.methods.teacher import OwnRows, ResponseStates, SoftTargets, Teacher, check_same_tokenizer
from lightning_itk.models.checkpoint import keep_out_of_checkpoints
from lightning_itk.trainer import InstructionData


class StoredHeads(NamedTuple):
    """By layer, query heads and head dimension of the queries and keys that are stored."""

    heads: Mapping[int, int]
    head_dims: Mapping[int, int]


class CachedTeacher(nn.Module):
    """Answers as a `Teacher` does, without a model. Samples are found by what they hold, in whatever batch they come.

    Its head is in no state dict.

    Args:
        folder: what `lightning-itk cache-teacher` wrote.

    Raises:
        ValueError: no such folder, or one that is unfinished or damaged.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.name = folder
        self.shards = Shards(folder)
        self.manifest = self.shards.manifest
        self.num_layers: int = self.manifest.teacher["layers"]
        self._watched: tuple[int, ...] = ()
        if self.manifest.mode == "states":
            for name, tensor in self.shards.head().items():
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        keep_out_of_checkpoints(self)

    @property
    def head(self) -> Head:
        """The teacher's output layer; only in mode `states`."""
        kind, own = self.manifest.teacher["head"], dict(self.named_parameters())
        return Head(own["weight"], own.get("bias"), kind["scale"], kind["softcap"])

    def describe(self) -> str:
        """What stands in for a model, in a few words."""
        made, size = self.manifest.settings, sum(file.bytes for file in self.manifest.files)
        kind = made["mode"] + (f" {made['k']} at temperature {made['temperature']:g}" if "k" in made else "")
        whose = f"{self.manifest.teacher['name']} from {self.name}"
        return f"{whose}: {kind}, {self.manifest.samples:,} samples, {size / 1e6:,.0f} MB"

    def watch(self, layers: Collection[int]) -> StoredHeads:
        """Hand out the stored queries and keys of these layers from now on."""
        stored = self._attention()
        if missing := sorted(set(layers) - stored.keys()):
            has = f"those of layers {sorted(stored)}" if stored else "none"
            raise ValueError(
                f"attention loss: {self.name} holds no queries and keys of teacher layers {missing}, but {has}: run "
                "cache-teacher with --attention true and these attention.layers, or set attention to null"
            )
        self._watched = tuple(layers)
        by_layer = {layer: (facts["heads"], facts["head_dim"]) for layer, facts in stored.items()}
        return StoredHeads(*({layer: found[which] for layer, found in by_layer.items()} for which in (0, 1)))

    def _attention(self) -> dict[int, dict[str, Any]]:
        return {int(layer): facts for layer, facts in self.manifest.teacher["attention"].items()}

    def soft_targets(
        self, batch: Batch, rows: ResponseRows, keep: Bool[Tensor, "B S"] | None = None
    ) -> SoftTargets | None:
        """`Teacher.soft_targets`, read instead of computed.

        Raises:
            ValueError: a sample that is not stored.
        """
        own = OwnRows.of(rows, keep)
        if own is None:
            return None
        host, device = own.rows.host, rows.places.device
        names = identities(host)
        if (gone := self.shards.missing(names)).any():
            record = int(host["sample_ids"][real_tokens(host)][sample_spans(host)[int(gone.argmax())].start])
            raise ValueError(f"{self.name}: holds no answer to sample {record}; run cache-teacher with this data")
        places = self.shards.places(names)

        def column(name: str) -> Tensor:
            parts = self.shards.read(name, places)
            found = joined(parts) if parts else self.shards.empty(name)
            return found.to(device, non_blocking=True)

        if self.manifest.mode == "states":
            answer: ResponseStates | TopK = ResponseStates(column("states"), self.head)
        else:
            made, vocab = self.manifest.settings, self.manifest.teacher["vocab"]
            ids, log_probs = column("ids").long(), column("log_probs").float()
            answer = TopK(ids, log_probs, column("nll"), vocab, made["temperature"])
        return SoftTargets(own, answer, {layer: self._layer(layer, host, column) for layer in self._watched})

    def _layer(self, layer: int, host: Batch, column: Any) -> LayerAttention:
        """A layer's queries and keys in the layout of the batch; 0 on padding, which no kept row sees."""
        real = real_tokens(host)
        q, k = (_laid_out(column(f"{kind}.{layer}"), real) for kind in "qk")
        facts = self._attention()[layer]
        return LayerAttention(q, k, **{name: facts[name] for name in ("scaling", "window", "softcap", "causal")})

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a student with another tokenizer than the teacher's. Raises ValueError."""
        check_same_tokenizer(tokenizer, str(self.shards.folder / TOKENIZER))

    def check_data(self, data: InstructionData, wanted: Any = None) -> None:
        """Refuse data with samples that are not stored, before the first step.

        Args:
            data: a data module; one that cannot tell its samples is looked at step by step.
            wanted: which teacher tags are this teacher's; None = all.

        Raises:
            ValueError: how many are missing, and in what the data differ from those that the teacher saw.
        """
        if data.drawn is None or data.token_settings is None:
            return
        total, absent, first = 0, 0, -1
        for samples, chosen in data.drawn():
            if wanted is not None:
                chosen = chosen[np.array([wanted(tag) for tag in samples.teachers])[samples.teacher_ids[chosen]]]
            missing = self.shards.missing(samples.identities(chosen))
            if missing.any() and not absent:
                first = int(samples.sample_ids[chosen[missing.argmax()]])
            total, absent = total + len(chosen), absent + int(missing.sum())
        if absent:
            changed = differences(self.manifest.settings["data"], data.token_settings)
            reason = f"its data differ in {', '.join(changed)}" if changed else "the validation files differ"
            raise ValueError(
                f"{self.name}: lacks {absent:,} of {total:,} samples, the first is record {first}: {reason}"
            )


AnyTeacher = Teacher | CachedTeacher


def _laid_out(tokens: Float[Tensor, "tokens H D"], real: Bool[Tensor, "B S"]) -> Float[Tensor, "B H S D"]:
    whole = tokens.new_zeros((real.numel(), *tokens.shape[1:]))
    places = real.flatten().nonzero().flatten().to(tokens.device, non_blocking=True)
    return whole.index_copy_(0, places, tokens).unflatten(0, real.shape).transpose(1, 2)
