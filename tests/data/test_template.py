"""Templates render as transformers renders them, and none runs for ever."""

import time

import pytest
from templates import TEMPLATES, chat
from transformers.utils.chat_template_utils import render_jinja_template

from lightning_itk.data.template import ChatTemplate

VARIED = """{% macro twice(x) %}{{ caller(x) }}{{ x ~ x }}{% endmacro %}{% filter upper %}a{{ messages[0].content }}
{% endfilter %}{% set x | trim %} q {% endset %}{{ x }}{% call(u) twice("z") %}<{{ u }}>{% endcall %}
{{- [1, 2] | map("string") | join(",") }}{{ none_such is defined }}{{ "a%sb" % 3 }}{{ "x" * 3 + "y" }}{{ 2 ** 5 }}
{% for m in messages if m.role == "user" %}{{ loop.index }}{{ m.items() | list | length }}{% endfor %}
{{ messages | tojson(indent=2) }}{{ messages[1:] | length }}{{ strftime_now("%Y") }}{{ bos_token.center(9) }}"""


@pytest.mark.parametrize("name", [*TEMPLATES, "varied"])
def test_templates_render_as_in_transformers(name: str) -> None:
    source = VARIED if name == "varied" else TEMPLATES[name][0]
    if source is None:
        return
    variables, marked = {"bos_token": "<s>", "eos_token": "</s>"}, "generation" in source
    conversations = [chat("q", "a\n", " why? ", "so"), chat("q", "a")]
    for add in (True, False):
        expected = render_jinja_template(
            conversations,
            chat_template=source,
            add_generation_prompt=add,
            return_assistant_tokens_mask=marked,
            **variables,
        )
        texts, spans = ChatTemplate(source, variables).render(conversations, add_generation_prompt=add, spans=marked)
        assert texts == expected[0]
        assert not marked or spans == expected[1]


GROW = "{{% set n = namespace(s={}) %}}{{% for _ in range(99) %}}{{% set n.s = {} %}}{{% endfor %}}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}" + "{% endfor %}" * 2,
        "{% for a in range(9999) %}{% for b in range(9999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        GROW.format("'xx'", "n.s ~ n.s"),
        GROW.format("'xx'", "n.s + n.s"),
        GROW.format("'xx'", "[n.s, n.s] | join"),
        GROW.format("[1]", "n.s + n.s"),
        GROW.format("3", "n.s * n.s"),
        "{% set n = namespace(s='xx') %}{% for _ in range(99) %}{% set y %}{{ n.s }}{{ n.s }}{% endset %}"
        "{% set n.s = y %}{% endfor %}",
        "{% for a in range(99999) %}" + "x" * 1000 + "{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ 'a' | center(9999999999) }}",
        "{{ 'a'.ljust(width=9999999999) }}",
    ],
)  # fmt: skip
def test_a_template_that_never_ends_is_one_line(source: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match="does not come to an end: it was stopped after more work") as raised:
        ChatTemplate(source, {}).render([chat("q", "a")])
    assert time.perf_counter() - start < 30
    assert "\n" not in str(raised.value)


def test_broken_and_recursive_templates_are_one_line() -> None:
    for source, error in (
        ("{% for %}", "TemplateSyntaxError"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ raise_exception('two\nlines') }}", "TemplateError: two lines"),
    ):
        with pytest.raises(ValueError, match=f"the chat template fails: {error}") as raised:
            ChatTemplate(source, {}).render([chat("q", "a")])
        assert "\n" not in str(raised.value)


def test_long_conversations_are_no_endless_ones() -> None:
    conversation = chat(*("word " * 50 for _ in range(2000)))
    looks_back = "{% for m in messages %}{% for n in messages[:loop.index] %}{% if n.role == 'x' %}{{ 1 }}{% endif %}"
    ChatTemplate(looks_back + "{% endfor %}{{ m.content }}{% endfor %}", {}).render([conversation[:1000]])
    for source, *_ in TEMPLATES.values():
        if source is not None:
            ChatTemplate(source, {"bos_token": "", "eos_token": ""}).render([conversation])
