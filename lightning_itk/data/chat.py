"""A conversation -> token ids, and which of them are learned.

Learned is what the assistant must write after a generation prompt: every assistant turn with its stop token, and
nothing else. The whole conversation is rendered and tokenized once, as inference would see it; the learned spans are
found in the rendered text and carried over to the tokens, so no token boundary is guessed.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lightning_itk.batch import IGNORE_INDEX

Message = dict[str, str]
Spans = list[tuple[int, int]]

ALPACA_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\\n\\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Response:\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% else %}{{ raise_exception('the Alpaca prompt knows the roles system, user and assistant') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
"""The plain prompt of tokenizers that bring no chat template (the Alpaca prompt, for many turns)."""

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PRIVATE_USE = range(0xE000, 0xF900)
_OPEN, _CLOSE = "\uf4f0", "\uf4f1"


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


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
    """Give a tokenizer all that training needs, in place, so that it can be saved with the model.

    A chat template (the given one, else its own, else the plain Alpaca prompt behind the BOS token if the tokenizer
    adds one) and a pad token (its own, else EOS or UNK is reused; the vocabulary never grows).

    Raises:
        ValueError: not a fast tokenizer, or neither a template nor an EOS token to end answers with.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: learned tokens are found by character offsets, "
            "which only the tokenizers library gives; convert it to a tokenizer.json first"
        )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    elif not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a chat template nor an EOS token: set one of them")
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + ALPACA_TEMPLATE
    if tokenizer.pad_token is None and (reused := tokenizer.eos_token or tokenizer.unk_token) is not None:
        tokenizer.pad_token = reused


class ChatEncoder:
    """Tokenizes conversations for training and for generation through a tokenizer's chat template.

    It holds no transformers tokenizer, so it is small to send to worker processes.

    Args:
        tokenizer: a fast tokenizer; `ensure_chat_template` is called on it.
        chat_template: replaces the tokenizer's own.

    Raises:
        ValueError: see `ensure_chat_template`; or the template cannot be read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        ensure_chat_template(tokenizer, chat_template)
        self.template: str = tokenizer.get_chat_template()
        self.eos: str | None = tokenizer.eos_token
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._has_generation_marks = bool(_GENERATION.search(self.template))
        # A copy without the truncation and padding that a tokenizer.json may carry.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        specials = set(tokenizer.all_special_tokens)
        for token in tokenizer.added_tokens_decoder.values():
            if token.special or re.fullmatch(r"<.+>|\[.+\]", token.content):
                specials.add(token.content)
        if tokenizer.bos_token != tokenizer.eos_token:
            specials.discard(tokenizer.bos_token)
        names = "|".join(re.escape(name) for name in sorted(filter(None, specials), key=len, reverse=True))
        gap = rf"|\s+{re.escape(self.eos)}" if self.eos else ""  # Llama 2 writes a space before </s>
        self._stop = re.compile(f"(?:{names or '(?!)'}){gap}")
        self._ends_with_stop = re.compile(f"(?:{names or '(?!)'})(?P<after>\\s*)$")
        self._missing_header, self._writes_before_answer = self._probe()

    def fingerprint(self) -> str:
        """A hash of everything that the token ids of a conversation depend on."""
        parts = (self._backend.to_str(), self.template, str(sorted(self._variables.items())))
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        """Tokenize conversations; the call batches, and the tokenizers library may use its threads.

        Raises:
            ValueError: the template refuses a conversation or hides what the assistant wrote.
        """
        rendered = self.render(conversations)
        encodings = self._backend.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        return [
            Encoded(
                np.array(encoding.ids, np.int32),
                np.array([_token_span(encoding, *span) for span in spans], np.int32).reshape(-1, 2),
            )
            for encoding, (_, spans) in zip(encodings, rendered, strict=True)
        ]

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that a model continues with the next assistant turn."""
        return self._render([messages], add_generation_prompt=True)[0] + self._missing_header

    def prompt_ids(self, messages: Sequence[Message]) -> np.ndarray:
        """Token ids int32 [tokens] of `prompt`."""
        return np.array(self._backend.encode(self.prompt(messages), add_special_tokens=False).ids, np.int32)

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
        said = [[message.get("learn", "") for message in c if message["role"] == "assistant"] for c in conversations]
        conversations = [[{"role": m["role"], "content": m["content"]} for m in c] for c in conversations]
        if self._has_generation_marks:
            texts, spans = self._call_template(conversations, return_assistant_tokens_mask=True)
            found: list[Spans | None] = [[(start, end) for start, end in spans_ if start < end] for spans_ in spans]
            if not all(found):
                raise ValueError("the chat template marks nothing of a conversation with {% generation %}")
        else:
            texts = self._render(conversations)
            marked = self._render([_mark(messages, _OPEN, _CLOSE) for messages in conversations])
            found = [_spans_of_marks(*pair, _OPEN, _CLOSE) for pair in zip(texts, marked, strict=True)]
        results = []
        for messages, learn, text, spans_ in zip(conversations, said, texts, found, strict=True):
            if not spans_ or not self._has_generation_marks and len(spans_) != len(_assistant_turns(messages)):
                spans_ = self._search_spans(messages, text)
            if self._writes_before_answer:
                spans_ = self._from_generation_prompt(messages, text, spans_)
            text, spans_ = self._with_stops(text, spans_, ended=learn[-1:] != ["words"])
            if "nothing" in learn:
                if len(spans_) != len(learn):
                    raise ValueError("the chat template does not mark every assistant turn, so weight 0 cannot be kept")
                spans_ = [span for span, mode in zip(spans_, learn, strict=True) if mode != "nothing"]
            results.append((text, spans_))
        return results

    def _render(self, conversations: Sequence[Sequence[Message]], **options: Any) -> list[str]:
        return self._call_template(conversations, **options)[0]

    def _call_template(self, conversations: Sequence[Sequence[Message]], **options: Any) -> tuple[list[str], list[Any]]:
        try:
            return render_jinja_template(  # type: ignore[return-value]
                list(map(list, conversations)), chat_template=self.template, **options, **self._variables
            )
        except Exception as error:  # a template is a program: any of its lines may fail
            raise ValueError(f"the chat template fails: {type(error).__name__}: {error}") from error

    def _probe(self) -> tuple[str, bool]:
        """What stands between generation prompt and answer: (a header to add to prompts, something to learn)."""
        question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": _OPEN}
        try:
            full = self._render([[question, answer]])[0]
            prompt = self._render([[question]], add_generation_prompt=True)[0]
            bare = self._render([[question]])[0]
        except ValueError:
            return "", False  # a template with demands of its own; records will tell
        before, mark, _ = full.partition(_OPEN)
        if not mark or not before.startswith(prompt) or not before[len(prompt) :].strip():
            return "", False
        if prompt == bare:
            return before[len(prompt) :], False  # the template ignores add_generation_prompt
        return "", not self._has_generation_marks  # e.g. Qwen 3 writes an empty <think> block into the answer

    def _search_spans(self, messages: Sequence[Message], text: str) -> Spans:
        """Spans of a conversation whose template trims or rewrites contents, or that holds our marks itself."""
        marks = (chr(code) for code in _PRIVATE_USE if chr(code) not in text)
        open_, close = next(marks), next(marks)
        for keep_outside in (False, True):  # outside the marks, outer whitespace can be trimmed
            marked = self._render([_mark(messages, open_, close, keep_outside=keep_outside)])[0]
            found = _spans_of_marks(text, marked, open_, close)
            if found and len(found) == len(_assistant_turns(messages)):
                return found
        spans: Spans = []
        for turn in _assistant_turns(messages):
            swapped = list(messages)
            swapped[turn] = {**messages[turn], "content": open_}
            before, mark, after = self._render([swapped])[0].partition(open_)
            prompt = self._render([messages[:turn]], add_generation_prompt=True)[0] + self._missing_header
            start = max((len(head) for head in (before, prompt) if text.startswith(head)), default=-1)
            end = len(text) - len(after)
            if not mark or not text.endswith(after) or start < 0 or start >= end:
                raise ValueError(
                    "the chat template rewrites the assistant's words, so what is learned cannot be told exactly: "
                    "put {% generation %} … {% endgeneration %} around them in the template"
                )
            spans.append((start, end))
        return spans

    def _from_generation_prompt(self, messages: Sequence[Message], text: str, spans: Spans) -> Spans:
        """Let each span begin right after its generation prompt, where the model begins to write."""
        extended = []
        for turn, (start, end) in zip(_assistant_turns(messages), spans, strict=True):
            prompt = self._render([messages[:turn]], add_generation_prompt=True)[0]
            extended.append((len(prompt) if text[:start].startswith(prompt) else start, end))
        return extended

    def _with_stops(self, text: str, spans: Spans, *, ended: bool = True) -> tuple[str, Spans]:
        """Extend each span over its stop token; append EOS where the last turn has none. ended False = not the last."""
        extended: Spans = []
        stop_text = ""
        for start, end in reversed(spans):
            if not ended and not extended:
                if self._has_generation_marks and (stop := self._ends_with_stop.search(text, start, end)):
                    end = stop.start()
            elif stop := self._stop.match(text, end):
                end = stop.end()
            elif self._has_generation_marks and (stop := self._ends_with_stop.search(text, start, end)):
                end -= len(stop["after"])  # the line break behind the stop token is not the assistant's
            elif not extended:
                if self.eos is None:
                    raise ValueError("the chat template writes no stop token and the tokenizer has no EOS token")
                stop_text = text[end:].rstrip()  # a stop that is no special token here, e.g. <|im_end|> as plain text
                text = text[:end] + stop_text + self.eos
                end = len(text)
            elif stop_text and text.startswith(stop_text, end):
                end += len(stop_text)
            extended.append((start, end))
        return text, extended[::-1]


def _assistant_turns(messages: Sequence[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _mark(messages: Sequence[Message], open_: str, close: str, *, keep_outside: bool = False) -> list[Message]:
    marked = []
    for message in messages:
        if message["role"] == "assistant":
            content = message["content"]
            core = content.strip() if keep_outside else content
            before, _, after = content.partition(core)
            message = {**message, "content": f"{before}{open_}{core}{close}{after}"}
        marked.append(message)
    return marked


def _spans_of_marks(text: str, marked: str, open_: str, close: str) -> Spans | None:
    """Where the marks stood, if the marked text is the plain text plus the marks; None if it is not."""
    spans: Spans = []
    position = 0
    while (start := marked.find(open_, position)) >= 0:
        end = marked.find(close, start)
        if end < 0:
            return None
        spans.append((start - 2 * len(spans), end - 2 * len(spans) - 1))
        position = end + 1
    if len(marked) - 2 * len(spans) != len(text) or marked.replace(open_, "").replace(close, "") != text:
        return None
    return spans or None


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
