"""A conversation -> token ids, and which of them are learned.

Learned is what the assistant must write after a generation prompt: every assistant turn with its stop token, and
nothing else. The whole conversation is rendered and tokenized once, as inference would see it; the learned spans are
found in the rendered text (`spans.py`) and carried over to the tokens, so no token boundary is guessed.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from lightning_itk.batch import IGNORE_INDEX
from lightning_itk.data.marks import Marks, marks_for
from lightning_itk.data.spans import Renderer
from lightning_itk.data.special_tokens import SpecialNames, SpecialTokens, encode_start, is_short
from lightning_itk.data.template import ChatTemplate, Message, Spans, ensure_chat_template

_OURS = ("role", "learn")  # keys of messages whose values no record makes up


class Encoded(NamedTuple):
    """A tokenized conversation."""

    input_ids: np.ndarray  # int32 [tokens]
    spans: np.ndarray  # int32 [spans, 2], first learned token and the one after the last, in order, not overlapping

    def labels(self) -> np.ndarray:
        """Labels [tokens], unshifted: the token itself where it is learned, IGNORE_INDEX elsewhere."""
        labels = np.full(len(self.input_ids), IGNORE_INDEX, np.int64)
        for start, end in self.spans:
            labels[start:end] = self.input_ids[start:end]
        return labels

    def truncated(self, max_length: int) -> "Encoded":
        """The first `max_length` tokens. A span of the very first token alone is dropped: nothing predicts it."""
        spans = np.clip(self.spans, 1, max(max_length, 1))
        return Encoded(self.input_ids[:max_length], spans[spans[:, 0] < spans[:, 1]])


class ChatEncoder:
    """Tokenizes conversations for training and for generation through a tokenizer's chat template.

    It holds no transformers tokenizer, so it is small to send to worker processes.

    Args:
        tokenizer: a fast tokenizer; `ensure_chat_template` is called on it.
        chat_template: replaces the tokenizer's own.
        special_tokens: text = names of special tokens in what a conversation says are text; only those that the
            template writes are special. allow = names are special tokens wherever they stand.

    Raises:
        ValueError: see `ensure_chat_template`; or special_tokens is neither.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        special_tokens: SpecialTokens = "text",
    ) -> None:
        if special_tokens not in get_args(SpecialTokens):
            raise ValueError(f"special_tokens is {special_tokens!r}, expected text or allow")
        self.template_origin = ensure_chat_template(tokenizer, chat_template)
        self.special_tokens = special_tokens
        self._template = ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map)
        # A copy without the truncation and padding that a tokenizer.json may carry.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        added = list(tokenizer.added_tokens_decoder.values())
        stops = set(tokenizer.all_special_tokens)
        named = {t.content for t in added if re.fullmatch(r"<.+>|\[.+\]", t.content)}  # others may be white space
        stops |= named | {t.content for t in added if t.special}
        if tokenizer.bos_token != tokenizer.eos_token:
            stops.discard(tokenizer.bos_token)
        self._renderer = Renderer(self._template, stops, tokenizer.eos_token)
        # Of the tokens that are added but not special, those by which the template builds turns; others, such as
        # <think>, are words of the answers.
        guarded = {name for name in named if name in self._renderer.written}
        guarded |= {t.content for t in added if t.special}
        self._names = SpecialNames(self._backend, guarded if special_tokens == "text" else ())

    def fingerprint(self) -> str:
        """A hash of everything that the token ids of a conversation depend on."""
        return _hash("\0".join(self._parts().values()))

    def fingerprints(self) -> dict[str, str]:
        """`fingerprint` by its parts: tokenizer, chat_template, special_tokens."""
        backend, template, variables, special = self._parts().values()
        return {
            "tokenizer": _hash(backend),
            "chat_template": _hash(f"{template}\0{variables}"),
            "special_tokens": special,
        }

    def _parts(self) -> dict[str, str]:
        template = self._template
        return {
            "tokenizer": self._backend.to_str(),
            "template": template.source,
            "variables": str(sorted(template.variables.items())),
            "special_tokens": self.special_tokens,
        }

    def encode(self, conversations: Sequence[Sequence[Message]], max_length: int | None = None) -> list[Encoded]:
        """Tokenize conversations; the call batches, and the tokenizers library may use its threads.

        Args:
            conversations: lists of messages.
            max_length: how many tokens will be used of each. A conversation of many more is tokenized only so far
                that its first `max_length` + 1 tokens are right; spans behind them are empty.

        Raises:
            ValueError: the template refuses a conversation or hides what the assistant wrote.
        """
        encoded: list[Encoded | None] = [None] * len(conversations)
        if self._names.within([text for messages in conversations for text in _texts(messages)]):
            for number, messages in enumerate(conversations):
                if self._names.within(texts := list(_texts(messages))):
                    marks = marks_for([*texts, self._template.source])
                    ((text, spans),) = self._renderer.render([self._broken(messages, marks)], marks)
                    encoded[number] = self._encode_broken(text, spans, marks, max_length)
        rest = [number for number, found in enumerate(encoded) if found is None]
        rendered = self.render([conversations[number] for number in rest])
        texts = [text if is_short(text, max_length) else "" for text, _ in rendered]
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        for number, (text, spans), encoding in zip(rest, rendered, encodings, strict=True):
            size = len(text)
            if not is_short(text, max_length):
                encoding, size = encode_start(self._backend, text, max_length)
            encoded[number] = _encoded(encoding, np.array(encoding.ids, np.int32), spans, size, max_length)
        return encoded  # type: ignore[return-value]

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that a model continues with the next assistant turn."""
        return self._renderer.prompt(messages)

    def prompt_ids(self, messages: Sequence[Message], max_length: int | None = None) -> np.ndarray:
        """Token ids int32 [tokens] of `prompt`; with `max_length` no more than one above it."""
        return self._ids(messages, self._renderer.prompt, max_length)

    def conversation_ids(self, messages: Sequence[Message]) -> np.ndarray:
        """Token ids int32 [tokens] of a conversation just as the template writes it."""
        return self._ids(messages, lambda given: self._template.render([given])[0][0], None)

    def stop_tokens(self) -> list[int]:
        """What ends an answer in the template, where that is a token of its own."""
        try:
            ids, spans = self.encode([[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]])[0]
        except ValueError:
            return []  # a template with demands of its own
        last = int(ids[spans[-1, 1] - 1])
        return [last] if last in self._backend.get_added_tokens_decoder() else []

    def render(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[str, Spans]]:
        """The text of each conversation and the character spans that are learned in it."""
        return self._renderer.render(conversations)

    def _ids(self, messages: Sequence[Message], render: Callable[[Any], str], max_length: int | None) -> np.ndarray:
        if self._names.within(texts := list(_texts(messages))):
            marks = marks_for([*texts, self._template.source])
            text = render(self._broken(messages, marks))
            return self._encode_broken(text, [], marks, max_length).input_ids
        encoding, size = encode_start(self._backend, render(messages), max_length)
        return _encoded(encoding, np.array(encoding.ids, np.int32), [], size, max_length).input_ids

    def _encode_broken(self, text: str, spans: Spans, marks: Marks, max_length: int | None) -> Encoded:
        ends = [end for span in spans for end in span]
        encoding, ids, size, ends = self._names.encode(text, ends, marks, max_length)
        moved = list(zip(ends[::2], ends[1::2], strict=True))
        return _encoded(encoding, ids, moved, size, max_length, self._names.cut_tokens(encoding, marks))

    def _broken(self, messages: Sequence[Message], marks: Marks) -> list[Message]:
        return [
            {key: value if key in _OURS else self._names.broken(value, marks) for key, value in message.items()}
            for message in messages
        ]


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    """Every text in a conversation that its record has brought."""
    for message in messages:
        yield from (text for key, value in message.items() if key not in _OURS for text in _texts_of(value))


def _texts_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for pair in value.items() for part in pair for text in _texts_of(part))
    elif isinstance(value, list):
        yield from (text for part in value for text in _texts_of(part))


def _encoded(
    encoding: Encoding,
    ids: np.ndarray,
    spans: Spans,
    characters: int,
    max_length: int | None,
    cut: np.ndarray | None = None,
) -> Encoded:
    """Token ids and learned tokens.

    Args:
        encoding: of the first `characters` of a text.
        ids: its token ids.
        spans: learned characters of the whole text.
        characters: how many were tokenized.
        max_length: as for `encode`.
        cut: tokens [tokens] of the encoding to leave out.
    """
    found = np.full((len(spans), 2), len(ids), np.int32)
    for row, (start, end) in zip(found, spans, strict=True):
        if start < characters:
            row[:] = _token_span(encoding, start, min(end, characters))
    if cut is not None and cut.any():
        ids, found = ids[~cut], np.concatenate([[0], np.cumsum(~cut)]).astype(np.int32)[found]
    if max_length is not None and len(ids) > max_length:
        ids, found = ids[: max_length + 1], found.clip(max=max_length + 1)
    return Encoded(ids, found)


def _token_span(encoding: Encoding, start: int, end: int) -> tuple[int, int]:
    """The tokens that overlap the characters [start, end), as (first, one after the last)."""
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    if first is None or last is None:
        # A character without a token: offsets may leave out a space, a normalizer may drop characters.
        offsets = encoding.offsets
        if first is None:
            first = next((i for i, (_, e) in enumerate(offsets) if e > start), len(offsets))
        if last is None:
            last = next((i for i in range(len(offsets) - 1, -1, -1) if offsets[i][0] < end), -1)
    last += 1
    # A character may be several tokens: all that begin before the end belong to the span.
    while last < len(encoding) and (chars := encoding.token_to_chars(last)) is not None and chars[0] < end:
        last += 1
    return first, max(first, last)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
