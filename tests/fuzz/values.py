"""Texts and JSON values as hostile as data get, and what damages a value or the bytes of a file."""

from typing import Any

from hypothesis import strategies as st

NASTY = [
    "", " ", "\n", "a", "\x00", "\x1e\x1f", "\u2028", "\x85", "é", "e\u0301", "東京", "😀", "\u202e", "\ufeff",
    "\ufffd", "\uf4f0", "\uf4f1", "\ue000", "\uf8ff", "<|im_start|>", "<|im_end|>", "<|im_start|>assistant\n", "</s>",
    "<s>", "<pad>", "<tag>", "[INST]", "### Response:\n", "{{ x }}", "{% generation %}", "{%", "}}", "\r\n", "\t", "Ġ",
    "\\n", '"', "'",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(NASTY) | st.text(max_size=8), max_size=5).map("".join)
WORDS = TEXTS.filter(str.strip)
"""Texts that are not blank."""
ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    0.5,
    "0",
    "1",
    10**30,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [None],
    "\ud800",
    "",
]
FIELDS = [
    "messages", "conversations", "system", "history", "instruction", "prompt", "input", "context", "response", "output",
    "completion", "teacher", "is_domain", "finished", "role", "content", "from", "value", "weight", "line\nbreak",
    "x" * 300,
]  # fmt: skip
VALUES = st.recursive(
    st.sampled_from(ODD) | TEXTS | st.just("long " * 800),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | TEXTS, inner, max_size=3),
    max_leaves=6,
)


def mutated(draw: Any, value: Any, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """A value with one of its parts replaced, removed, renamed, doubled or wrapped."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3), label="descend"):
        key = draw(st.sampled_from(sorted(value)), label="key")
        how = draw(st.sampled_from(["inside", "inside", "replace", "remove", "rename", "add"]), label="how")
        rest = {name: item for name, item in value.items() if name != key}
        if how == "remove":
            return rest
        if how == "rename":
            return rest | {draw(st.sampled_from(FIELDS), label="name"): value[key]}
        if how == "add":
            return value | {draw(st.sampled_from(FIELDS), label="name"): draw(values, label="value")}
        return value | {key: mutated(draw, value[key], values) if how == "inside" else draw(values, label="value")}
    if isinstance(value, list) and value and draw(st.integers(0, 3), label="descend"):
        place = draw(st.integers(0, len(value) - 1), label="place")
        how = draw(st.sampled_from(["inside", "inside", "replace", "remove", "double"]), label="how")
        before, item, after = value[:place], value[place], value[place + 1 :]
        if how == "remove":
            return before + after
        if how == "double":
            return [*before, item, item, *after]
        return [*before, mutated(draw, item, values) if how == "inside" else draw(values, label="value"), *after]
    return draw(st.just([value]) | st.just({"content": value}) | values, label="value")


def damaged(draw: Any, content: bytes) -> bytes:
    """A file's bytes, cut, flipped, overwritten, doubled, in another encoding or with what editors add."""
    how = draw(
        st.sampled_from(
            ["cut", "flip", "flip", "zeros", "insert", "double", "bom", "crlf", "utf-16", "latin", "blank", "junk"]
        ),
        label="damage",
    )
    place = draw(st.integers(0, max(len(content) - 1, 0)), label="place")
    if how == "cut":
        return content[:place]
    if how == "flip" and content:
        return (
            content[:place] + bytes([content[place] ^ 1 << draw(st.integers(0, 7), label="bit")]) + content[place + 1 :]
        )
    if how == "zeros":
        length = draw(st.integers(1, 64), label="length")
        return content[:place] + bytes(length) + content[place + length :]
    if how == "insert":
        extra = draw(
            st.sampled_from([b"\n", b",", b"]", b"[", b"{", b"\xff", b"\x00", b" ", b"1", b'"']) | st.binary(max_size=4)
        )
        return content[:place] + extra + content[place:]
    changes = {
        "double": lambda: content + content,
        "bom": lambda: b"\xef\xbb\xbf" + content,
        "crlf": lambda: content.replace(b"\n", b"\r\n"),
        "utf-16": lambda: content.decode("utf-8", "replace").encode("utf-16"),
        "latin": lambda: content.decode("utf-8", "replace").encode("latin-1", "replace"),
        "blank": lambda: content.replace(b"\n", b"\n \n\n"),
        "junk": lambda: draw(st.binary(max_size=40), label="junk"),
    }
    return changes.get(how, lambda: content)()
