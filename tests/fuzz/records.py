"""Records through the check and the chat encoder: what is learned is what the assistant said and its stop."""

import json
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from fuzz.engine import one_line
from fuzz.values import TEXTS, WORDS, mutated
from hypothesis import strategies as st
from tiny import byte_tokenizer

from lightning_itk.batch import IGNORE_INDEX
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.records import DataError
from lightning_itk.data.sources import Chunk, Source, parse_chunk

Turn = tuple[str, str, str]  # role, words, and what is learned of them: "", "nothing" or "words"


class Style(NamedTuple):
    """A chat template, told once as Jinja and once by `pieces`."""

    before: str = "<|im_start|>%\n"  # % = the role
    stop: str = "<|im_end|>"
    after: str = "\n"
    bos: str = ""
    trim: bool = False
    marks: str = ""  # {% generation %} around the answer "alone" or "with stop"
    system: bool = True
    prompt: bool = True  # knows add_generation_prompt

    def template(self) -> str:
        """As Jinja."""
        said = "m['content'] | trim" if self.trim else "m['content']"
        stop, before = repr(self.stop), repr(self.before)
        answer = f"{{{{ {said} }}}}{{{{ {stop} }}}}"
        if self.marks == "alone":
            answer = f"{{% generation %}}{{{{ {said} }}}}{{% endgeneration %}}{{{{ {stop} }}}}"
        elif self.marks:
            answer = f"{{% generation %}}{answer}{{% endgeneration %}}"
        refuse = "" if self.system else "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        body = f"{refuse}{{{{ {before}.replace('%', m['role']) }}}}"
        body += f"{{% if m['role'] == 'assistant' %}}{answer}{{% else %}}{{{{ {said} }}}}{{{{ {stop} }}}}{{% endif %}}"
        text = f"{{{{ {self.bos!r} }}}}{{% for m in messages %}}{body}{{{{ {self.after!r} }}}}{{% endfor %}}"
        opened = repr(self.before.replace("%", "assistant"))
        return text + (f"{{% if add_generation_prompt %}}{{{{ {opened} }}}}{{% endif %}}" if self.prompt else "")

    def pieces(self, turns: list[Turn]) -> list[tuple[str, bool]]:
        """The text of a conversation in pieces, and which of them are learned."""
        made = [(self.bos, False)]
        for role, words, learn in turns:
            words = words.strip() if self.trim else words
            learned = role == "assistant" and learn != "nothing"
            made += [(self.before.replace("%", role), False), (words, learned)]
            made += [(self.stop, learned and learn != "words"), (self.after, False)]
        return made


STYLES = [
    Style(),
    Style(marks="with stop"),
    Style(marks="alone"),
    Style(prompt=False),
    Style("<|%|>\n", "</s>", "\n"),
    Style("<|%|>\n\n", "<|im_end|>", "", bos="<s>", trim=True),
    Style("<|im_start|>%\n", "<|im_end|>", "\n", bos="<s>", trim=True, system=False),
    Style("[%] ", " </s>", " ", prompt=False, system=False),
    Style("### %:\n", "</s>", "\n\n", marks="with stop"),
]


@cache
def tokenizer() -> Any:
    """A token is a byte or a special one, so that no token lies across an edge."""
    made = byte_tokenizer()
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return made


@cache
def encoder(style: Style) -> ChatEncoder:
    """Of a style."""
    return ChatEncoder(tokenizer(), style.template())


@cache
def token_bytes() -> list[bytes]:
    """What each token stands for, without the tokenizer's own decoding."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in visible}
    letters |= {chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in visible)}
    names = tokenizer().convert_ids_to_tokens(range(len(tokenizer())))
    return [bytes([letters[name]]) if name in letters else name.encode() for name in names]


def case(data: st.DataObject) -> str:
    """A record of some form, as it is or spoilt."""
    draw = data.draw
    turns, record, columns = record_of(draw)
    spoilt = draw(st.integers(0, 3), label="changes")
    for _ in range(spoilt):
        record = mutated(draw, record)
    style = draw(st.sampled_from(STYLES), label="style")
    try:
        line = json.dumps(record, ensure_ascii=draw(st.booleans(), label="ascii")).encode("utf-8", "surrogatepass")
        chunk = Chunk("data.jsonl", "line", 0, [1], [line if draw(st.booleans(), label="line") else json.loads(line)])
        (found,) = parse_chunk(chunk, Source("data.jsonl", columns=columns))
    except DataError as error:
        one_line(error, "data.jsonl line 1: ")
        return _refused(spoilt > 0, "refused", error)
    if not spoilt:
        said = [(m["role"], m["content"], m.get("learn", "")) for m in found.messages]
        assert said == turns, "the messages are not those that were written"
    else:
        turns = [(m["role"], m["content"], m.get("learn", "")) for m in found.messages]
        said_words = [words for _, words, _ in turns]
        assert all(isinstance(words, str) and _said(words, record) for words in said_words), "words that nobody wrote"
    try:
        (encoded,) = encoder(style).encode([found.messages])
    except ValueError as error:
        one_line(error)
        return _refused(not style.system and turns[0][0] == "system", "refused by the template", error)
    check_labels(style, turns, encoded.input_ids, encoded.labels())
    limit = draw(st.integers(2, 40), label="max_length")
    cut = encoded.truncated(limit)
    assert (cut.labels()[1:] == encoded.labels()[1:limit]).all()
    return "accepted"


def check_labels(style: Style, turns: list[Turn], ids: np.ndarray, labels: np.ndarray) -> None:
    """Byte by byte: the text is the template's, and learned is what `Style.pieces` says."""
    assert labels.shape == ids.shape
    learned = labels != IGNORE_INDEX
    assert (labels[learned] == ids[learned]).all(), "a label is not its token"
    pieces = [(text.encode(), flag) for text, flag in style.pieces(turns)]
    text, wanted = b"".join(text for text, _ in pieces), b"".join(bytes([flag]) * len(text) for text, flag in pieces)
    tokens = [token_bytes()[token] for token in ids]
    assert b"".join(tokens) == text, f"the text is {b''.join(tokens)!r}, expected {text!r}"
    found = b"".join(bytes([flag]) * len(token) for token, flag in zip(tokens, learned.tolist(), strict=True))
    if found != wanted:
        differ = [i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
        kind = "is learned" if found[differ[0]] else "is not learned"
        raise AssertionError(f"{text[differ[0] : differ[-1] + 1]!r} {kind} in {text!r}")


def _refused(rightly: bool, outcome: str, error: Exception) -> str:
    assert rightly, f"{outcome} without a reason: {error}"
    return outcome


def _said(words: str, record: Any) -> bool:
    """Whether every part of a message's words stands in the record."""
    texts = list(_strings(record))
    return words in texts or any(
        words == f"{a}\n\n{b}" for a in texts if words.startswith(a) for b in texts if words.endswith(b)
    )


def _strings(value: Any) -> Any:
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(item)


def record_of(draw: Any) -> tuple[list[Turn], Any, dict[str, str] | None]:
    """A conversation, a record that holds it, and the map of its columns."""
    rounds = [
        (draw(TEXTS, label="asked"), draw(WORDS, label="said")) for _ in range(draw(st.integers(1, 3), label="rounds"))
    ]
    system = draw(st.none() | WORDS, label="system")
    finished = draw(st.sampled_from([None, True, False]), label="finished")
    extra = {} if finished is None else {"finished": finished}
    extra |= draw(st.sampled_from([{}, {"teacher": "law"}, {"is_domain": 1}, {"id": 7, "tags": ["x"]}]), label="extra")
    form = draw(st.sampled_from(["messages", "conversations", "fields", "lists"]), label="form")
    turns: list[Turn] = []
    if form in ("messages", "conversations"):
        weights = [draw(st.sampled_from([None, 1, 0]), label="weight") for _ in rounds]
        weights[-1] = weights[-1] or None
        for (asked, said), weight in zip(rounds, weights, strict=True):
            turns += [("user", asked, ""), ("assistant", said, "nothing" if weight == 0 else "")]
        user, assistant, role, words = ("human", "gpt", "from", "value") if form == "conversations" else (
            "user", "assistant", "role", "content"
        )  # fmt: skip
        messages = []
        for (asked, said), weight in zip(rounds, weights, strict=True):
            messages += [{role: user, words: asked}, {role: assistant, words: said}]
            messages[-1] |= {} if weight is None else {"weight": weight}
        if draw(st.booleans(), label="words nobody answers"):
            messages.append({role: user, words: draw(TEXTS, label="unanswered")})
        if system is not None and draw(st.booleans(), label="system as a message"):
            messages.insert(0, {role: "system", words: system})
        elif system is not None:
            extra["system"] = system
        record: dict[str, Any] = {form: messages, **extra}
    else:
        for asked, said in rounds:
            turns += [("user", asked, ""), ("assistant", said, "")]
        prompt, response = draw(
            st.sampled_from([("instruction", "output"), ("prompt", "completion"), ("prompt", "response")])
        )
        record = {**extra, **({} if system is None else {"system": system})}
        if form == "lists":
            messages = [{"role": role, "content": words} for role, words, _ in turns]
            record |= {
                prompt: messages[:-1],
                response: messages[-1:] if draw(st.booleans(), label="as a list") else turns[-1][1],
            }
        else:
            context, (asked, said) = draw(st.none() | TEXTS, label="context"), rounds[-1]
            turns[-2] = ("user", "\n\n".join(part for part in (asked, context or "") if part), "")
            record |= {
                prompt: asked,
                response: said,
                draw(st.sampled_from(["input", "context"]), label="its name"): context,
            }
            record |= {"history": [list(pair) for pair in rounds[:-1]]} if len(rounds) > 1 else {}
    if finished is False:
        turns[-1] = (*turns[-1][:2], "words")
    if system is not None:
        turns.insert(0, ("system", system, ""))
    known = [name for name in record if name not in ("finished", "id", "tags")]
    if not draw(st.booleans(), label="other names"):
        return turns, record, None
    columns = {name: f"{name} of ours" for name in draw(st.sets(st.sampled_from(sorted(known))), label="mapped")}
    return turns, {columns.get(name, name): value for name, value in record.items()}, columns
