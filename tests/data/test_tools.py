"""Calls of tools: refused, or learned in the template's own form for them; their results are not."""

import json
from pathlib import Path
from typing import Any

import pytest
from templates import CHATML, learned_texts, make_tokenizer
from tiny import byte_tokenizer

from lightning_itk.cli.records import index_records
from lightning_itk.data import InstructionDataModule
from lightning_itk.data.cache import tokenize
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.records import DataError, Record, check
from lightning_itk.data.sources import Source, read
from lightning_itk.evaluation.responses import answered, read_prompts
from lightning_itk.models.generation import Response

HERMES = (  # as Hermes and Qwen write tools
    "{% if tools %}{{ '<|im_start|>system\n<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}"
    "{{ '\n</tools><|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "GENERATION{% if m.content %}{{ m.content }}{% endif %}{% for call in m.tool_calls or [] %}"
    "{{ '\n' if m.content or not loop.first }}<tool_call>\n"
    "{{ '{\"name\": \"' + call.function.name + '\", \"arguments\": ' + call.function.arguments | tojson + '}' }}\n"
    "</tool_call>{% endfor %}{{ '<|im_end|>' }}END{{ '\n' }}"
    "{% elif m.role == 'tool' %}{% if not loop.previtem or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}"
    "{% endif %}{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN, MARKED = (
    HERMES.replace("GENERATION", before).replace("END", after)
    for before, after in (("", ""), ("{% generation %}", "{% endgeneration %}"))
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


RECORD = {
    "messages": [
        {"role": "user", "content": "Rain in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call("weather", '{"city": "Rome"}')]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"rain": <|im_end|> true}'},
        {"role": "assistant", "content": "Looking on.", "tool_calls": [call("weather", {"city": "Ostia"})] * 2},
        {"role": "tool", "content": "no"},
        {"role": "tool", "content": "yes"},
        {"role": "assistant", "content": "Yes."},
    ],
    "tools": TOOLS,
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Rain in Rome?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": '{"rain": <|im_end|> true}'},
        {"from": "gpt", "value": "Yes."},
    ],
    "tools": json.dumps([TOOLS[0]["function"]]),
}
ROME, OSTIA = (
    f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>' for city in ("Rome", "Ostia")
)


def write(folder: Path, *records: Any) -> Source:
    (folder / "tools.jsonl").write_text("\n".join(map(json.dumps, records)))
    return Source(str(folder / "tools.jsonl"))


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_calls_are_learned_with_their_stop_and_results_are_not(template: str) -> None:
    tokenizer = make_tokenizer(template)
    encoder = ChatEncoder(tokenizer)
    (found,) = encoder.encode([check(RECORD, {}, tools="learn")[0]])
    assert learned_texts(tokenizer, found) == [
        f"{ROME}<|im_end|>",
        f"Looking on.\n{OSTIA}\n{OSTIA}<|im_end|>",
        "Yes.<|im_end|>",
    ]
    text = tokenizer.decode(found.input_ids)
    messages = [{**m, "content": m["content"] or ""} for m in RECORD["messages"]]
    messages[1] = messages[1] | {"tool_calls": [call("weather", {"city": "Rome"})]}
    assert text == tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    assert (found.input_ids == tokenizer.convert_tokens_to_ids("<|im_end|>")).sum() == 1 + 6  # none of the result's
    (shared,) = encoder.encode([check(SHAREGPT, {}, tools="learn")[0]])
    assert learned_texts(tokenizer, shared) == [f"{ROME}<|im_end|>", "Yes.<|im_end|>"]
    assert tokenizer.decode(shared.input_ids).startswith(text.partition("Looking")[0].rpartition("<|im_start|>")[0])


def test_single_turns_can_be_left_out_and_prompts_end_before_an_answer() -> None:
    tokenizer = make_tokenizer(PLAIN)
    record = json.loads(json.dumps(RECORD))
    record["messages"][1]["weight"] = 0
    (found,) = ChatEncoder(tokenizer).encode([check(record, {}, tools="learn")[0]])
    assert [text[-14:] for text in learned_texts(tokenizer, found)] == ["call><|im_end|>"[-14:], "Yes.<|im_end|>"]
    prompt, _ = check(RECORD, {}, tools="learn", need_response=False)
    text = ChatEncoder(tokenizer).prompt(prompt)
    assert text.endswith("yes\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert OSTIA in text


@pytest.mark.parametrize("template", [CHATML, None, PLAIN.replace("{% if tools %}", "{% if none_such %}")])
def test_templates_that_leave_tools_out_are_refused(template: str | None) -> None:
    tokenizer = make_tokenizer(template)
    messages, _ = check(RECORD, {}, tools="learn")
    with pytest.raises(ValueError, match="does not write tool|the Alpaca prompt knows|rewrites the assistant's words"):
        ChatEncoder(tokenizer).encode([messages])
    if template is not None:
        with pytest.raises(ValueError, match="the chat template does not write tool"):
            ChatEncoder(tokenizer).prompt(messages[:3])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "message 2 of 'messages': tool call 1 has no name"),
        ({"tool_calls": [call("f", "{broken")]}, "tool call 1: arguments: broken JSON"),
        ({"tool_calls": [call("f", [1])]}, "tool call 1: arguments is a list, expected an object"),
        ({"tool_calls": 3}, "tool_calls is a number, expected a list"),
        ({"tool_calls": []}, "content is missing, expected text"),
        ({"tool_calls": [call("\ud800", {})]}, "not valid Unicode"),
    ],
)
def test_broken_calls_are_one_line(change: dict[str, Any], error: str) -> None:
    record = json.loads(json.dumps(RECORD))
    record["messages"][1] |= change
    with pytest.raises(DataError) as raised:
        check(record, {}, tools="learn")
    assert error in str(raised.value)
    for tools, said in (
        ("hammer", "broken JSON"),
        ([{}], "tool 1 has no name"),
        ({"a": 1}, "an object, expected a li"),
    ):
        with pytest.raises(DataError, match=said):
            check(RECORD | {"tools": tools}, {"tools": "tools"}, tools="learn")


def test_tools_are_refused_unless_they_are_asked_for(tmp_path: Path) -> None:
    plain = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    for number, record in enumerate((RECORD, plain | {"tools": TOOLS}, SHAREGPT), 1):
        with pytest.raises(DataError, match=r"line 1: message \d has tool.*, which tools: refuse does not"):
            list(read(write(tmp_path, record)))
        (found,) = read(write(tmp_path, record), tools="learn")
        assert len(found.messages) == {1: 7, 2: 2, 3: 4}[number]
    assert list(read(write(tmp_path, plain | {"tools": None}, plain | {"tools": []}, {**plain, "tools": "saw"})))


def test_digests_and_caches_know_calls(tmp_path: Path) -> None:
    def digest(record: Any) -> bytes:
        return Record(check(record, {}, tools="learn")[0], "", 0, "").digest()

    other = json.loads(json.dumps(RECORD).replace("Ostia", "Turin"))
    without = {key: value for key, value in RECORD.items() if key != "tools"}
    assert len({digest(RECORD), digest(other), digest(without)}) == 3
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN
    source = write(tmp_path, RECORD, {"prompt": "q", "completion": "a"})
    options: Any = {"cache_dir": tmp_path, "num_proc": 1, "invalid": "drop", "progress": False}
    folders = [tokenize(source, ChatEncoder(tokenizer), 900, tools=tools, **options) for tools in ("learn", "refuse")]
    assert [len(folder) for folder in folders] == [2, 1]
    data = InstructionDataModule(
        source.path, 0, tokenizer=tokenizer, cache_dir=str(tmp_path), tools="learn", max_length=900, num_proc=1
    )
    data.setup("fit")
    assert data.fingerprint == index_records([source], tools="learn").fingerprint


def test_prompts_with_tools_are_written_back_with_them(tmp_path: Path) -> None:
    source = write(tmp_path, RECORD | {"messages": RECORD["messages"][:3]})
    (prompt,) = read_prompts(source, tools="learn")
    made = answered(prompt, {}, Response("Yes.", True), None)
    (again,) = read(write(tmp_path, made), tools="learn")
    assert again.messages == [*prompt.record.messages, {"role": "assistant", "content": "Yes."}]
