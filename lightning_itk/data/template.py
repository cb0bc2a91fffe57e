"""Chat templates: the one of a tokenizer, and rendering it with a limit on its work.

A template is a program that comes with a tokenizer or from a file. Jinja's sandbox keeps it from the machine; the limit
here keeps it from running for ever and from filling the memory. It counts what the template does instead of the time,
so a record is refused on every machine or on none.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from lightning_itk.data.errors import DataError

Message = dict[str, Any]
Spans = list[tuple[int, int]]

_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n"
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\\n\\n"
)
ALPACA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{% if loop.first %}{{ '" + _WITH_INPUT + "' if message['input'] else '" + _WITHOUT_INPUT + "' }}{% endif %}"
    "{% if message['input'] %}"
    "{{ '### Instruction:\\n' + message['instruction'] + '\\n\\n### Input:\\n' + message['input'] + '\\n\\n' }}"
    "{% else %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}{% endif %}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Response:' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% else %}{{ raise_exception('the Alpaca prompt knows the roles system, user and assistant') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:' }}{% endif %}"
)
"""The plain prompt of tokenizers that bring no chat template: Stanford Alpaca's byte for byte, for many turns."""

# What a template may do: for any conversation, for each character and each message of it (templates that look back from
# every message take quadratic time), in characters that are made; and what a turn of a loop counts.
_WORK, _PER_CHARACTER, _PER_MESSAGE, _STEP = 10_000_000, 100, 20_000, 25
_BUDGET = "work left"  # no name that a template could use


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> str:
    """Give a tokenizer all that training needs, in place, so that it can be saved with the model.

    A chat template (the given one, else its own, else the plain Alpaca prompt behind the BOS token if the tokenizer
    adds one) and a pad token (its own, else EOS or UNK is reused; the vocabulary never grows).

    Returns:
        Which template that is, in words.

    Raises:
        ValueError: not a fast tokenizer, or neither a template nor an EOS token to end answers with.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: learned tokens are found by character offsets, "
            "which only the tokenizers library gives; convert it to a tokenizer.json first"
        )
    origin = "the tokenizer's own"
    if chat_template is not None:
        tokenizer.chat_template, origin = chat_template, "as given by chat_template"
    elif not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a chat template nor an EOS token: set one of them")
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + ALPACA_TEMPLATE
    if str(tokenizer.chat_template).endswith(ALPACA_TEMPLATE) and chat_template is None:
        origin = "the Alpaca prompt, as the tokenizer has no other"
    if tokenizer.pad_token is None and (reused := tokenizer.eos_token or tokenizer.unk_token) is not None:
        tokenizer.pad_token = reused
    return origin


class ChatTemplate:
    """A chat template that renders conversations.

    Args:
        source: the Jinja template.
        variables: what it may use beside the conversation, such as `eos_token`.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        self.source, self.variables = source, dict(variables)

    def render(
        self, conversations: Sequence[Sequence[Message]], *, add_generation_prompt: bool = False, spans: bool = False
    ) -> tuple[list[str], list[Spans]]:
        """The text of each conversation; with `spans` also where {% generation %} marks it, else no spans.

        A conversation's tools are those that its first message holds.

        Raises:
            ValueError: the template is broken, refuses a conversation, or does not come to an end.
        """
        texts, marked = [], []
        for messages in conversations:
            blocks: list[str] = []
            found: Spans = []
            characters = sum(len(message["content"]) for message in messages)
            budget = [_WORK + _PER_CHARACTER * characters + _PER_MESSAGE * len(messages)]
            values = {
                "messages": [{k: v for k, v in m.items() if k not in ("learn", "tools")} for m in messages],
                "tools": messages[0].get("tools") if messages else None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                _BUDGET: budget,
            }
            whole = budget[0]
            try:
                template = _compiled(self.source)
                tracker = template.environment.activate_tracker  # type: ignore[attr-defined]
                with tracker(blocks, found) if spans else nullcontext():
                    for block in template.generate(self.variables | values):
                        blocks.append(block)
            except TooMuchWork:
                raise ValueError(
                    "the chat template does not come to an end: it was stopped after more work than a conversation of "
                    f"this length can need ({whole:,} characters and steps)"
                ) from None
            except Exception as error:  # a template is a program: any of its lines may fail
                reason = " ".join(str(error).split())
                raise ValueError(f"the chat template fails: {type(error).__name__}: {reason}") from error
            texts.append("".join(blocks))
            marked.append(found)
        return texts, marked


class TooMuchWork(Exception):
    """A template has used up what it may do."""


@jinja2.pass_context
def _spend(context: jinja2.runtime.Context, value: Any) -> Any:
    """The value, after the work that it stands for was counted."""
    if isinstance(value, str | list | tuple | dict | range):
        _count(context, len(value))
    elif isinstance(value, int) and value > _WORK:  # e.g. a width to fill up to
        _count(context, value)
    return value


@jinja2.pass_context
def _step(context: jinja2.runtime.Context, work: int) -> bool:
    """Count one turn of a loop or call of a macro."""
    _count(context, work)
    return True


def _count(context: jinja2.runtime.Context, work: int) -> None:
    left = context.parent[_BUDGET]
    left[0] -= work
    if left[0] < 0:
        raise TooMuchWork


def _operate(context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
    """An operator of which a few uses can make something huge; what it will make is counted beforehand."""
    sized = str | list | tuple
    if operator == "*":
        for one, other in ((left, right), (right, left)):
            if isinstance(one, sized) and isinstance(other, int):
                _count(context, len(one) * max(other, 0))
        if isinstance(left, int) and isinstance(right, int):
            _count(context, (left.bit_length() // 64) * (right.bit_length() // 64))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _count(context, (left.bit_length() * abs(right) // 64) ** 2)
    elif operator == "+" and isinstance(left, sized) and isinstance(right, sized):
        _count(context, len(left) + len(right))
    elif operator == "%" and isinstance(left, str):
        digits = "".join(character if character.isdigit() else " " for character in left).split()
        _count(context, sum(int(number[:9]) for number in digits))
    environment: Any = context.environment
    return environment.binop_table[operator](left, right)


class _Meter(NodeTransformer):
    """Puts the counting into a template's syntax tree, where no name of the template reaches it."""

    def _spent(self, node: Any) -> Any:
        return nodes.Filter(node, "itk_spend", [], [], None, None)

    def _step(self, body: Sequence[nodes.Node]) -> Any:
        words = sum(len(data.data) for node in body for data in node.find_all(nodes.TemplateData))
        return nodes.Filter(nodes.Const(_STEP + words), "itk_step", [], [], None, None)

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(self._step([]), node.test)
        node.body = [nodes.ExprStmt(self._step(node.body)), *node.body]
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self.generic_visit(node)
        node.body = [nodes.ExprStmt(self._step(node.body)), *node.body]
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        node.body = [self.visit(statement) for statement in node.body]  # the call itself must stay one
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [part if isinstance(part, nodes.TemplateData) else self._spent(part) for part in node.nodes]
        return node

    def _called(self, node: Any) -> Any:
        self.generic_visit(node)
        node.args = [self._spent(argument) for argument in node.args]
        for keyword in node.kwargs:
            keyword.value = self._spent(keyword.value)
        return self._spent(node)

    def visit_Call(self, node: nodes.Call) -> Any:
        return self._called(node)

    def visit_Filter(self, node: nodes.Filter) -> Any:
        inner: Any = node
        while isinstance(inner, nodes.Filter):
            inner = inner.node
        return node if inner is None else self._called(node)  # none: it filters a block

    def visit_Concat(self, node: nodes.Concat) -> Any:
        self.generic_visit(node)
        return self._spent(node)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    """A template in the sandbox of transformers, with its work counted."""
    fresh: Any = getattr(_compile_jinja_template, "__wrapped__", _compile_jinja_template)
    environment: Any = fresh("").environment
    environment.filters |= {"itk_spend": _spend, "itk_step": _step}
    environment.globals.pop("lipsum", None)
    environment.intercepted_binops = frozenset(("*", "**", "+", "%"))
    environment.call_binop = _operate
    return environment.from_string(_Meter().visit(environment.parse(source)))


def read_template(given: str | None) -> str | None:
    """The Jinja chat template that is given, itself or as the name of a file."""
    if given is None or "{" in given or "\n" in given:
        return given
    try:
        return Path(given).read_text()
    except OSError as error:
        raise DataError(f"chat_template: {given}: neither a Jinja template nor a readable file: {error}") from None
