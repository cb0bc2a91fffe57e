"""A frozen model to learn from: loaded, kept in eval mode, kept out of checkpoints."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_itk.attention.capture import AttentionTap, LayerAttention, install
from lightning_itk.batch import Batch
from lightning_itk.losses.chunked import Head
from lightning_itk.models.checkpoint import keep_out_of_checkpoints
from lightning_itk.models.hidden import check_head, hidden_states
from lightning_itk.models.loading import DType, first_difference, load_causal_lm, load_tokenizer


class Answer(NamedTuple):
    """What a teacher says about a batch."""

    states: Float[Tensor, "B S H"]  # the head's input
    head: Head
    attention: Mapping[int, LayerAttention]  # queries and keys of the layers that are watched


class Teacher(nn.Module):
    """A causal LM that only answers.

    Its parameters need no gradient, it stays in eval mode whatever its parent does, its tensors never enter a state
    dict, and a strict `load_state_dict` of the parent does not miss them.

    Args:
        model: folder, hub name, or a loaded `PreTrainedModel`.
        dtype: "auto" keeps the checkpoint's.
        attn_implementation: sdpa, eager, flash_attention_2, …; None lets transformers choose.
        trust_remote_code: run code that comes with the model.
        model_kwargs: more arguments for `from_pretrained`: `quantization_config`, `device_map`, …
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        dtype: DType = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name = model if isinstance(model, str) else type(model).__name__
        self._trust_remote_code = trust_remote_code
        if isinstance(model, str):
            model = load_causal_lm(
                model,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                model_kwargs=model_kwargs,
            )
        self.model = model.requires_grad_(False).eval()
        self._tap: AttentionTap | None = None
        self._watched: tuple[int, ...] = ()
        check_head(self.model)
        keep_out_of_checkpoints(self)

    def train(self, mode: bool = True) -> "Teacher":
        """A teacher has no training mode."""
        return super().train(False)

    def watch(self, layers: Collection[int]) -> AttentionTap:
        """Hand out the queries and keys of these layers from now on."""
        self._tap, self._watched = install(self.model, layers), tuple(layers)
        return self._tap

    @torch.no_grad()
    def forward(self, batch: Batch) -> Answer:
        """The head's input for every position of the batch, the head, and what `watch` asked for."""
        if self._tap is None:
            return Answer(*hidden_states(self.model, batch), {})
        with self._tap.record(self._watched) as seen:
            states = hidden_states(self.model, batch)
        return Answer(*states, seen)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a student with another tokenizer: probabilities over different tokens cannot be compared.

        Raises:
            ValueError: names the first differing token.
        """
        own = load_tokenizer(self.name, trust_remote_code=self._trust_remote_code)
        difference = first_difference(tokenizer, own)
        if difference:
            raise ValueError(f"student and teacher {self.name!r} have different tokenizers: {difference}")
