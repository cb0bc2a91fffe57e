"""The text of a conversation, and which of its characters are learned: every assistant turn with its stop token.

Templates that mark their generations tell. Of the others it is found out by rendering once more with marks around what
the assistant says, or with another answer in its place; a template that cannot be understood is refused, never guessed.
"""

import re
from collections.abc import Iterable, Sequence

from lightning_itk.data.marks import USUAL, Marks, marks_for
from lightning_itk.data.template import ChatTemplate, Message, Spans

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_OPEN, _CLOSE = 0, 1  # kinds of marks


class Renderer:
    """Renders conversations and finds what is learned in them.

    Args:
        template: the chat template.
        stops: tokens that may end a turn.
        eos: the tokenizer's, which is appended where the template writes no stop; None = it has none.
    """

    def __init__(self, template: ChatTemplate, stops: Iterable[str], eos: str | None) -> None:
        self.template, self.eos = template, eos
        self._has_generation_marks = bool(_GENERATION.search(template.source))
        names = "|".join(re.escape(name) for name in sorted(filter(None, stops), key=len, reverse=True))
        gap = rf"|\s+{re.escape(eos)}" if eos else ""  # Llama 2 writes a space before </s>
        self._stop = re.compile(f"(?:{names or '(?!)'}){gap}")
        self._ends_with_stop = re.compile(f"(?:{names or '(?!)'})(?P<after>\\s*)$")
        self._missing_header, self._writes_before_answer, self.written = self._probe()

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that a model continues with the next assistant turn."""
        text = self._render([messages], add_generation_prompt=True)[0]
        self._check_tools(messages, text, text, add_generation_prompt=True)
        return text + self._missing_header

    def render(self, conversations: Sequence[Sequence[Message]], marks: Marks | None = None) -> list[tuple[str, Spans]]:
        """The text of each conversation and the character spans that are learned in it; marks: that none holds."""
        if marks is None:
            marks = marks_for([m["content"] for messages in conversations for m in messages] + [self.template.source])
        if self._has_generation_marks:
            texts, spans = self.template.render(conversations, spans=True)
            found: list[Spans | None] = [[(start, end) for start, end in spans_ if start < end] for spans_ in spans]
            if not all(found):
                raise ValueError("the chat template marks nothing of a conversation with {% generation %}")
        else:
            texts = self._render(conversations)
            marked = self._render([_mark(messages, marks) for messages in conversations])
            found = [_spans_of_marks(*pair, marks) for pair in zip(texts, marked, strict=True)]
        results = []
        for messages, text, spans_ in zip(conversations, texts, found, strict=True):
            calls = any("tool_calls" in message for message in messages)
            if not self._has_generation_marks and (
                calls or not spans_ or len(spans_) != len(_assistant_turns(messages))
            ):
                spans_ = self._search_spans(messages, text, marks, calls=calls)
            assert spans_
            if self._writes_before_answer:
                spans_ = self._from_generation_prompt(messages, text, spans_)
            learn = [messages[turn].get("learn", "") for turn in _assistant_turns(messages)]
            self._check_tools(messages, text, "".join(text[start:end] for start, end in spans_))
            text, spans_ = self._with_stops(text, spans_, ended=learn[-1:] != ["words"])
            if "nothing" in learn:
                if len(spans_) != len(learn):
                    raise ValueError("the chat template does not mark every assistant turn, so weight 0 cannot be kept")
                spans_ = [span for span, mode in zip(spans_, learn, strict=True) if mode != "nothing"]
            results.append((text, spans_))
        return results

    def _render(self, conversations: Sequence[Sequence[Message]], *, add_generation_prompt: bool = False) -> list[str]:
        return self.template.render(conversations, add_generation_prompt=add_generation_prompt)[0]

    def _probe(self) -> tuple[str, bool, str]:
        """What stands between generation prompt and answer: (a header to add to prompts, something to learn); and what
        the template writes around turns of the user and behind an answer."""
        mark = USUAL[_OPEN]
        question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": mark}
        try:
            full = self._render([[question, answer]])[0]
            prompt = self._render([[question]], add_generation_prompt=True)[0]
            bare = self._render([[question]])[0]
        except ValueError:
            return "", False, ""  # a template with demands of its own; records will tell
        before, found, after = full.partition(mark)
        written = f"{bare}\0{after}"
        if not found or not before.startswith(prompt) or not before[len(prompt) :].strip():
            return "", False, written
        if prompt == bare:
            return before[len(prompt) :], False, written  # the template ignores add_generation_prompt
        return "", not self._has_generation_marks, written  # e.g. Qwen 3 writes an empty <think> block into the answer

    def _check_tools(self, messages: Sequence[Message], text: str, said: str, **options: bool) -> None:
        """Refuse a template that leaves out tools, or calls from what the assistant says."""
        calls = [call["function"]["name"] for message in messages for call in message.get("tool_calls", ())]
        if missing := next((name for name in calls if name not in said), None):
            raise ValueError(f"the chat template does not write tool calls: nothing is said of the call of {missing!r}")
        if messages[0].get("tools"):
            without = {key: value for key, value in messages[0].items() if key != "tools"}
            if self._render([[without, *messages[1:]]], **options)[0] == text:
                raise ValueError("the chat template does not write tools: its text is the same without them")

    def _search_spans(self, messages: Sequence[Message], text: str, marks: Marks, *, calls: bool) -> Spans:
        """Spans of a conversation whose template trims or rewrites contents, or that calls tools."""
        if not calls:  # a call has no words to put marks around; outside the marks, outer whitespace can be trimmed
            marked = self._render([_mark(messages, marks, keep_outside=True)])[0]
            found = _spans_of_marks(text, marked, marks)
            if found and len(found) == len(_assistant_turns(messages)):
                return found
        spans: Spans = []
        for turn in _assistant_turns(messages):
            swapped = list(messages)
            swapped[turn] = {**messages[turn], "content": marks[_OPEN]}
            swapped[turn].pop("tool_calls", None)
            before, mark, after = self._render([swapped])[0].partition(marks[_OPEN])
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


def _mark(messages: Sequence[Message], marks: Marks, *, keep_outside: bool = False) -> list[Message]:
    marked = []
    for message in messages:
        if message["role"] == "assistant":
            content = message["content"]
            core = content.strip() if keep_outside else content
            before, _, after = content.partition(core) if core else ("", "", content)
            message = {**message, "content": f"{before}{marks[_OPEN]}{core}{marks[_CLOSE]}{after}"}
        marked.append(message)
    return marked


def _spans_of_marks(text: str, marked: str, marks: Marks) -> Spans | None:
    """Where the marks stood, if the marked text is the plain text plus the marks; None if it is not."""
    open_, close = marks[_OPEN], marks[_CLOSE]
    spans: Spans = []
    position = 0
    while (start := marked.find(open_, position)) >= 0:
        end = marked.find(close, start)
        if end < 0:
            return None
        before = len(spans) * (len(open_) + len(close))
        spans.append((start - before, end - before - len(open_)))
        position = end + len(close)
    if marked.replace(open_, "").replace(close, "") != text:
        return None
    return spans or None
