"""A model's answers to prompts: the one loop, with one rule for where an answer ends."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


class Response(NamedTuple):
    """What a model answered."""

    text: str
    finished: bool  # the model ended it itself, before max_new_tokens


class Generator:
    """Answers prompts with a model.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        stops: what ends an answer beside the model's and the tokenizer's EOS, see `ChatEncoder.stop_tokens`.
        max_new_tokens: longest response.
        temperature: 0 = the likeliest token each time; otherwise tokens are drawn from the whole distribution.
        seed: of drawing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stops: Iterable[int] = (),
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        if max_new_tokens < 1 or temperature < 0 or seed < 0:
            raise ValueError(
                "max_new_tokens must be at least 1, temperature and seed not negative, "
                f"found {max_new_tokens}, {temperature} and {seed}"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.seed = max_new_tokens, seed
        known = getattr(model.generation_config, "eos_token_id", None)
        self.stops = sorted({*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id, *stops} - {None})
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        self._config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            eos_token_id=self.stops,
            pad_token_id=self.pad_id,
            **drawn,
        )

    def answer(self, prompts: Sequence[np.ndarray], number: int = 0) -> list[Response]:
        """Answer one batch.

        Args:
            prompts: token ids, one array each.
            number: of the batch; the random numbers depend on it and the seed only.
        """
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, width - len(prompt) :] = 1
        return self.complete(ids, mask, number)

    @torch.no_grad()
    def complete(self, ids: Int[Tensor, "B S"], mask: Int[Tensor, "B S"], number: int = 0) -> list[Response]:
        """`answer` for prompts that are padded on the left already; the mask is 0 on padding."""
        device, training = self.model.device, self.model.training
        self.model.eval()
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed((self.seed << 32) + number)
                output = self.model.generate(  # type: ignore[operator]
                    input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=self._config
                )
        finally:
            self.model.train(training)
        return [self._response(row) for row in output[:, ids.shape[1] :].tolist()]

    def _response(self, tokens: list[int]) -> Response:
        end = next((i for i, token in enumerate(tokens) if token in self.stops), len(tokens))
        text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        assert isinstance(text, str)
        # A lone half of a character at the cut is no text; what the tokenizer makes of it stays.
        return Response(text.strip(), end < len(tokens))
