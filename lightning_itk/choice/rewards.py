"""Rewards of responses from a sequence-classification model, as reward models on the hub are."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification

from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.records import Message
from lightning_itk.data.special_tokens import SpecialTokens
from lightning_itk.hub import load_tokenizer
from lightning_itk.models.loading import DType, MissingWeights, load_model


class RewardModel:
    """Gives each conversation one number for its last turn.

    A tokenizer with a chat template sees the conversation through it; one without sees question and answer as a pair
    of texts, as encoder reward models do.

    Args:
        name: folder or hub name of a sequence classifier with one output.
        dtype: "auto" keeps the checkpoint's.
        device: where it runs.
        trust_remote_code: run code that comes with the model.
        special_tokens: text = names of special tokens in a conversation are text, as for training.

    Raises:
        ValueError: not such a model, or a head that would be random.
    """

    def __init__(
        self,
        name: str,
        *,
        dtype: DType = "auto",
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
        special_tokens: SpecialTokens = "text",
    ) -> None:
        auto = AutoModelForSequenceClassification
        try:
            model = load_model(auto, name, dtype=dtype, trust_remote_code=trust_remote_code)
        except MissingWeights as error:
            raise ValueError(f"{name!r} is no reward model: {error.first} is not in it and would be random") from error
        if model.config.num_labels != 1:
            raise ValueError(f"{name!r} is no reward model: it has {model.config.num_labels} outputs, expected 1")
        self.name, self.model = name, model.eval().to(device)  # type: ignore[arg-type]
        self.tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        self._special_tokens: SpecialTokens = special_tokens
        # Only the tokenizers library tells special tokens from their names.
        guarded = self.tokenizer.chat_template and getattr(self.tokenizer, "is_fast", False)
        self._encoder = ChatEncoder(self.tokenizer, special_tokens=special_tokens) if guarded else None
        if model.config.pad_token_id is None:  # decoders look for the last token that is no padding
            model.config.pad_token_id = self.tokenizer.pad_token_id

    def token_ids(self, conversation: Sequence[Message]) -> dict[str, list[int]]:
        """What the model reads of a conversation that ends with the assistant's turn."""
        if self._encoder is not None:
            ids = self._encoder.conversation_ids(conversation).tolist()
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(list(conversation), tokenize=False)
            encoded = self.tokenizer(text, add_special_tokens=False)
        else:
            question = "\n\n".join(message["content"] for message in conversation[:-1])
            split = self._special_tokens == "text"
            encoded = self.tokenizer(question, conversation[-1]["content"], split_special_tokens=split)
        return {name: list(values) for name, values in encoded.items()}

    @torch.no_grad()
    def __call__(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        batch_size: int = 8,
        progress: Callable[[int], None] = lambda done: None,
    ) -> NDArray[np.float64]:
        """The reward of each conversation [conversations].

        Raises:
            ValueError: a conversation longer than the model reads: cut off, it would be judged for something else.
        """
        encoded = [self.token_ids(conversation) for conversation in conversations]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        lengths = np.array([len(entry["input_ids"]) for entry in encoded], np.int64)
        if limit is not None and (lengths > limit).any():
            first = int(np.flatnonzero(lengths > limit)[0])
            raise ValueError(
                f"conversation {first} has {lengths[first]} tokens, the reward model {self.name!r} reads {limit}"
            )
        rewards = np.full(len(encoded), np.nan)
        order = np.argsort(-lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = self.tokenizer.pad([encoded[row] for row in rows], return_tensors="pt").to(self.model.device)
            rewards[rows] = self.model(**inputs).logits[:, 0].double().cpu().numpy()
            progress(min(start + batch_size, len(order)))
        if not np.isfinite(rewards).all():
            raise ValueError(f"the reward model {self.name!r} gives {rewards[~np.isfinite(rewards)][0]} as a reward")
        return rewards
