"""Records: check one and bring it into one form, a list of messages with an optional teacher tag.

Known forms: `messages` (role, content; also ShareGPT's `conversations` with from, value), Alpaca (`instruction`,
`input`, `output`; as LLaMA-Factory has it also `system`, and `history` in pairs), Dolly (`instruction`, `context`,
`response`) and `prompt` with `completion`. A message with `weight: 0` is context only; the end of an answer that was
cut off when it was generated (`finished: false`) is not learned. Calls of tools (`tool_calls`, role `tool`, `tools`)
are refused unless they are asked for. Everything wrong with a record is one line.
"""

import hashlib
import json
import reprlib
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Literal, NamedTuple

from lightning_itk.data.errors import DataError, kind_of
from lightning_itk.data.tools import Tools, tool_calls, tool_schemas

Message = dict[str, Any]
"""`role` and `content`. An assistant's may say `learn`: "nothing" of it, or its "words" without the end; and hold
`tool_calls`. A user's that was made of two fields has them as `instruction` and `input`. The first may hold `tools`."""

# The first name that a record has is taken. `generate` leaves out whatever a response may be called.
# New names are listed above, too, in the docstring of InstructionDataModule and in the README.
PROMPTS, CONTEXTS, RESPONSES = ("instruction", "prompt"), ("input", "context"), ("response", "output", "completion")
CONVERSATIONS = ("messages", "conversations")
ROLES = (*CONVERSATIONS, "system", "history", "tools", *PROMPTS, *CONTEXTS, *RESPONSES, "teacher", "is_domain")
"""Our names for what a record holds: the keys of `Source.columns`."""

_CHAT_ROLES = {name: name for name in ("system", "user", "assistant", "tool")} | {"human": "user", "gpt": "assistant"}
_TOOL_ROLES = {"function": "tool", "observation": "tool", "function_call": "assistant"}
_WRITTEN = ("role", "content", "tool_calls", "name", "tool_call_id")  # keys of a message that files have, too


Invalid = Literal["refuse", "drop"]
"""What becomes of a record that cannot be used: an error, or it is left out and counted."""


class Record(NamedTuple):
    """A checked record."""

    messages: list[Message]  # ends with an assistant turn
    teacher: str  # its own tag, "" if it has none
    number: int  # in its source, from 0
    place: str  # for error messages, e.g. "shop.jsonl line 17"
    invalid: str = ""  # why it cannot be used; then there are no messages

    def digest(self) -> bytes:
        """16 bytes that tell this record's conversation from any other."""
        parts = [part for message in self.messages for part in (message["role"], message["content"])]
        text = "\x1e".join(map("\x1f".join, zip(parts[::2], parts[1::2], strict=True)))
        tools = [{key: m[key] for key in ("tools", *_WRITTEN[2:]) if key in m} for m in self.messages]
        if any(tools):
            text = json.dumps([parts, tools], default=str)
        elif any("\x1e" in part or "\x1f" in part for part in parts):  # what separates may also stand within
            text = json.dumps(parts)
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


class Fingerprint:
    """A hash of the records of one source in their order, whatever the tokenizer."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, digests: bytes) -> None:
        """Add records: their digests, one after the other."""
        self._hash.update(digests)

    def __str__(self) -> str:
        return self._hash.hexdigest()


def joint_fingerprint(sources: Iterable[object]) -> str:
    """The fingerprint of several sources, one after the other, from that of each."""
    return hashlib.blake2b("".join(map(str, sources)).encode(), digest_size=16).hexdigest()


def parse_line(line: bytes) -> Any:
    """The JSON value of a line.

    Raises:
        DataError: not UTF-8, or not JSON.
    """
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text: byte 0x{line[error.start]:02x} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"broken JSON: {error.msg} at character {error.pos + 1}") from None
    except (RecursionError, ValueError) as error:  # ValueError: a whole number of thousands of digits
        raise DataError(beyond_json(error)) from None


def beyond_json(error: Exception) -> str:
    """What is JSON, but beyond what a parser takes."""
    reason = "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"
    return f"broken JSON: {reason}"


def check(
    record: Any, columns: Mapping[str, str], *, need_response: bool = True, tools: Tools = "refuse"
) -> tuple[list[Message], str]:
    """Check a record and bring it into one form.

    Args:
        record: what a parser returned.
        columns: our name for a field (`ROLES`) -> its name in the record.
        need_response: False reads prompts: a response may be missing, and one that is there is left out.
        tools: learn = take calls of tools, their results and descriptions.

    Returns:
        The messages, the last one the assistant's (or, for prompts, not the assistant's), and the record's own
        teacher tag, "" if it has none. `is_domain` true and false mean the tags expert and reference.

    Raises:
        DataError: a field is missing, empty or of the wrong type; unknown chat role; no assistant turn.
    """
    if not isinstance(record, dict):
        raise DataError(f"the record is {kind_of(record)}, expected an object with fields")
    for role, column in columns.items():
        if column not in record and not (role in RESPONSES and not need_response):
            raise DataError(f"no column {column!r} (columns maps {role} to it), found {_names(record)}")

    def find(names: tuple[str, ...]) -> str | None:
        """The record's name of the first of our fields that it has; mapped ones first."""
        mapped = next((columns[name] for name in names if name in columns), None)
        return mapped or next((name for name in names if record.get(name) is not None), None)

    if (key := find(CONVERSATIONS)) is not None and not any(name in columns for name in PROMPTS + RESPONSES):
        messages = _conversation(record[key], key)
    else:
        messages = _single_turn(record, find, need_response)
    if (key := find(("tools",))) is not None and ("tools" in columns or _is_list(record[key])):
        messages[:1] = [first | {"tools": tool_schemas(record[key], f"field {key!r}")} for first in messages[:1]]
    if (key := find(("system",))) is not None and (system := _text(record, key, optional=True)):
        if messages and messages[0]["role"] == "system":
            raise DataError(f"field {key!r} beside a message of the role system, expected one of them")
        messages.insert(0, {"role": "system", "content": system})
    if described := [message.pop("tools") for message in messages if "tools" in message]:
        messages[0] |= {"tools": described[0]} if described[0] else {}
    if need_response:
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()  # words nobody answers teach nothing
        if not messages:
            raise DataError("no assistant turn, expected at least one message of the role assistant")
        for message in messages:
            if message["role"] == "assistant" and not message["content"].strip() and "tool_calls" not in message:
                raise DataError("empty response, expected text in every assistant turn")
        if all(message.get("learn") == "nothing" for message in messages if message["role"] == "assistant"):
            raise DataError("every assistant turn has weight 0, so nothing is learned")
        if record.get("finished") is False and "learn" not in messages[-1]:
            messages[-1]["learn"] = "words"
    else:
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise DataError("no prompt, expected a message that is not the assistant's")
    for number, message in enumerate(messages, 1):
        used = "tools" if "tools" in message else "tool calls" if "tool_calls" in message else ""
        used = "a tool's result" if message["role"] == "tool" else used
        if used and tools == "refuse":
            raise DataError(f"message {number} has {used}, which tools: refuse does not take, and tools: learn does")
        try:
            (json.dumps(message, ensure_ascii=False, default=str) if used else message["content"]).encode()
        except UnicodeEncodeError:
            raise DataError("the text holds half of a surrogate pair, which is not valid Unicode") from None
    return messages, _teacher(record, find)


def _single_turn(record: dict[str, Any], find: Any, need_response: bool) -> list[Message]:
    prompt_key, response_key = find(PROMPTS), find(RESPONSES)
    if prompt_key is None:
        expected = f"{', '.join(PROMPTS)} or messages (or map yours with columns)"
        raise DataError(f"no prompt: expected a field {expected}, found {_names(record)}")
    if need_response and response_key is None:
        raise DataError(f"missing response: expected one of {', '.join(RESPONSES)}, found {_names(record)}")
    messages = [] if (key := find(("history",))) is None else _history(record[key], key)
    context_key = find(CONTEXTS)
    context = "" if context_key is None else _text(record, context_key, optional=True)
    if isinstance(record[prompt_key], list):  # a conversation as prompt
        if context:
            raise DataError(f"field {context_key!r} beside a conversation in {prompt_key!r}: write it into a message")
        prompt = _conversation(record[prompt_key], prompt_key)
        if not prompt:
            raise DataError(f"field {prompt_key!r} is an empty list, expected a prompt")
    else:
        asked = _text(record, prompt_key)
        prompt = [{"role": "user", "content": "\n\n".join(part for part in (asked, context) if part)}]
        if asked and context:
            prompt[0] |= {"instruction": asked, "input": context}
    messages += prompt
    if need_response and response_key is not None:
        if isinstance(record[response_key], list):
            messages += _conversation(record[response_key], response_key)
        else:
            messages.append({"role": "assistant", "content": _text(record, response_key)})
    return messages


def _conversation(turns: Any, key: str) -> list[Message]:
    if not isinstance(turns, list):
        raise DataError(f"field {key!r} is {kind_of(turns)}, expected a list of messages")
    messages = []
    for number, turn in enumerate(turns, 1):
        where = f"message {number} of {key!r}"
        if not isinstance(turn, dict):
            raise DataError(f"{where} is {kind_of(turn)}, expected an object with role and content")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        roles = _CHAT_ROLES | _TOOL_ROLES
        if not isinstance(role, str) or role not in roles:
            raise DataError(f"{where}: unknown role {reprlib.repr(role)}, expected one of {', '.join(_CHAT_ROLES)}")
        message: Message = {"role": roles[role], "content": content}
        if message["role"] == "assistant" and (calls := tool_calls(turn, where)):
            message["tool_calls"] = calls
            message["content"] = "" if content is None or role == "function_call" else content
        if message["role"] == "tool":
            message |= {name: turn[name] for name in _WRITTEN[3:] if isinstance(turn.get(name), str)}
        if turn.get("tools"):
            message["tools"] = tool_schemas(turn["tools"], f"{where}: tools")
        if not isinstance(message["content"], str):
            raise DataError(f"{where}: content is {kind_of(content)}, expected text")
        messages.append(message)
        weight = turn.get("weight")
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            raise DataError(f"{where}: weight is {reprlib.repr(weight)}, expected 0 or 1")
        if weight == 0 and messages[-1]["role"] == "assistant":
            messages[-1]["learn"] = "nothing"
    return messages


def _history(pairs: Any, key: str) -> list[Message]:
    """Earlier turns as pairs of what the user and the assistant said."""
    messages = []
    for number, pair in enumerate(pairs if isinstance(pairs, list) else [pairs], 1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(
                f"field {key!r}: turn {number} is {kind_of(pair)}, expected [what was asked, what was said]"
            )
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return messages


def written(messages: Iterable[Message]) -> list[Message]:
    """Messages as a file has them, without the keys that only this kit knows."""
    return [
        {key: message[key] for key in _WRITTEN if key in message}
        | ({"weight": 0} if message.get("learn") == "nothing" else {})
        for message in messages
    ]


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or isinstance(value, str) and value.lstrip().startswith("[")


def _text(record: dict[str, Any], key: str, *, optional: bool = False) -> str:
    value = record[key]
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise DataError(f"field {key!r} is {kind_of(value)}, expected text")
    return value


def _teacher(record: dict[str, Any], find: Any) -> str:
    if (key := find(("teacher",))) is not None:
        return _text(record, key, optional=True)
    if (key := find(("is_domain",))) is not None:
        value = record[key]
        if value not in (0, 1):
            raise DataError(f"field {key!r} is {reprlib.repr(value)}, expected 0, 1, true or false")
        return "expert" if value else "reference"
    return ""


def _names(record: dict[str, Any]) -> str:
    """The fields, in a line of bounded length whatever they are called."""
    names = [name if name.isprintable() and len(name) < 50 else reprlib.repr(name) for name in islice(record, 20)]
    return ", ".join([*names, "…"] if len(record) > 20 else names) or "no fields"
