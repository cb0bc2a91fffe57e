"""A frozen model to learn from, and what it gives a student to match."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_itk.attention.capture import AttentionTap, LayerAttention, install
from lightning_itk.batch import Batch, ResponseRows, on_device, response_rows, select
from lightning_itk.hub import first_difference, load_tokenizer
from lightning_itk.losses.chunked import Head, TokenScores, linear_token_scores
from lightning_itk.losses.topk import TopK
from lightning_itk.models.checkpoint import keep_out_of_checkpoints
from lightning_itk.models.hidden import check_head, hidden_states
from lightning_itk.models.loading import DType, load_causal_lm
from lightning_itk.models.offload import check_one_device, offload_layers
from lightning_itk.models.sharded_loading import is_deferred


class TeacherOutput(NamedTuple):
    """What a teacher makes of a batch."""

    states: Float[Tensor, "B S H"]  # the head's input
    head: Head
    attention: Mapping[int, LayerAttention]  # queries and keys of the layers that are watched


class OwnRows(NamedTuple):
    """A teacher's samples of a batch: those only, in the layout of the student's batch."""

    rows: ResponseRows  # of the teacher's samples; `rows.host` is their batch
    places: Int[Tensor, "b s"] | None  # where each token stands in the student's flattened batch; None = the same place

    @classmethod
    def of(cls, rows: ResponseRows, keep: Bool[Tensor, "B S"] | None) -> "OwnRows | None":
        """Args: rows of the whole batch; keep: True on the tokens of the samples, None = all. None where none is."""
        if keep is None:
            return cls(rows, None)
        part = select(rows.host, keep.cpu())
        if part is None:
            return None
        (host, places), device = part, rows.places.device
        found = response_rows(host)
        places, where, tokens = (t.to(device, non_blocking=True) for t in (places, found.places, found.targets))
        return cls(ResponseRows(where, tokens, host), places)


class ResponseStates(NamedTuple):
    """A teacher's whole distribution at its response rows."""

    states: Float[Tensor, "n H"]  # the head's input
    head: Head

    def scores(self, targets: Int[Tensor, " n"], max_scratch_bytes: int | None = None) -> TokenScores:
        """What the teacher thinks of the right tokens."""
        return linear_token_scores(self.states, self.head, targets, max_scratch_bytes=max_scratch_bytes)


class SoftTargets(NamedTuple):
    """What a teacher gives the student to match, on the samples that are its own."""

    own: OwnRows
    answer: ResponseStates | TopK
    attention: Mapping[int, LayerAttention]  # by teacher layer, in the layout of its samples

    @property
    def targets(self) -> Int[Tensor, " n"]:
        """The tokens that follow at the response rows."""
        return self.own.rows.targets

    @property
    def student_rows(self) -> Int[Tensor, " n"]:
        """Where the response rows stand in the student's flattened batch."""
        rows, places = self.own
        return rows.places if places is None else places.flatten()[rows.places]


class Teacher(nn.Module):
    """A causal LM that only answers.

    Its parameters need no gradient, it stays in eval mode whatever its parent does, its tensors never enter a state
    dict, and a strict `load_state_dict` of the parent does not miss them.

    Args:
        model: folder, hub name, `.gguf` file, or a loaded `PreTrainedModel`.
        dtype: "auto" keeps the checkpoint's.
        attn_implementation: sdpa, eager, flash_attention_2, …; None lets transformers choose.
        trust_remote_code: run code that comes with the model.
        model_kwargs: more arguments for `from_pretrained`: `revision`, `gguf_file`, `quantization_config`, …
        offload: keep the decoder layers in host memory; each comes to the device when it runs. Answers stay the same.

    Raises:
        ValueError: a model that cannot be loaded, whose head is not known, or that `device_map` spreads over devices.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        dtype: DType = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__()
        self.name = model if isinstance(model, str) else type(model).__name__
        self._by_name = isinstance(model, str)
        self._loading: dict[str, Any] = {"trust_remote_code": trust_remote_code, "model_kwargs": model_kwargs}
        if isinstance(model, str):
            model = load_causal_lm(
                model,
                dtype=dtype,
                attn_implementation=attn_implementation,
                **self._loading,
            )
        check_one_device(model, self.name)
        self.model = model.requires_grad_(False).eval()
        self.num_layers: int = model.config.get_text_config().num_hidden_layers
        self._tap: AttentionTap | None = None
        self._watched: tuple[int, ...] = ()
        if not is_deferred(self.model):
            check_head(self.model)
        keep_out_of_checkpoints(self)
        if offload:
            offload_layers(self.model)

    def train(self, mode: bool = True) -> "Teacher":
        """A teacher has no training mode."""
        return super().train(False)

    def watch(self, layers: Collection[int]) -> AttentionTap:
        """Hand out the queries and keys of these layers from now on."""
        self._tap, self._watched = install(self.model, layers), tuple(layers)
        return self._tap

    @torch.no_grad()
    def forward(self, batch: Batch) -> TeacherOutput:
        """The head's input for every position of the batch, the head, and what `watch` asked for."""
        if self._tap is None:
            return TeacherOutput(*hidden_states(self.model, batch), {})
        with self._tap.record(self._watched) as seen:
            states = hidden_states(self.model, batch)
        return TeacherOutput(*states, seen)

    def soft_targets(
        self, batch: Batch, rows: ResponseRows, keep: Bool[Tensor, "B S"] | None = None
    ) -> SoftTargets | None:
        """Run on the teacher's samples of a batch, and on nothing else.

        Args:
            rows: the response rows of the batch.
            keep: True on the tokens of its samples; None = all of them. On the CPU there is nothing to wait for.

        Returns:
            What the student is to match; None when no sample is the teacher's.
        """
        own = OwnRows.of(rows, keep)
        if own is None:
            if isinstance(self.model, FSDPModule):  # the other ranks wait for this one to gather the weights
                self(_first_token(batch))
            return None
        part = batch if own.places is None else on_device(own.rows.host, batch["input_ids"].device)
        found = self(part)
        return SoftTargets(
            own, ResponseStates(found.states.flatten(0, 1)[own.rows.places], found.head), found.attention
        )

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The teacher's tokenizer; None where it was given as a loaded model."""
        return load_tokenizer(self.name, **self._loading) if self._by_name else None

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a student with another tokenizer: probabilities over different tokens cannot be compared.

        Raises:
            ValueError: names the first differing token.
        """
        check_same_tokenizer(tokenizer, self.name, **self._loading)


def check_same_tokenizer(tokenizer: PreTrainedTokenizerBase, teacher: str, **loading: Any) -> None:
    """`Teacher.check_tokenizer`, by the teacher's name."""
    if difference := first_difference(tokenizer, load_tokenizer(teacher, **loading)):
        raise ValueError(f"student and teacher {teacher!r} have different tokenizers: {difference}")


def _first_token(batch: Batch) -> Batch:
    return Batch(**{key: v[:1, :1] if isinstance(v, Tensor) else v for key, v in batch.items()})  # type: ignore[typeddict-item]
