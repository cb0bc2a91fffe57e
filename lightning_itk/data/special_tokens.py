"""Special tokens in the text of records: names there are text, whatever they spell.

Only special tokens that the chat template itself writes may become special token ids. Names in what a record says are
broken up by marks while the template is rendered, so that every name which is whole afterwards is the template's. The
marks are then taken out again, stand-ins take the place of the template's special tokens, and a copy of the tokenizer
that knows the stand-ins but no special token reads the text: ordinary text and broken names alike keep the tokens of
plain text, for nothing is cut where the tokenizer would not cut.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer

from lightning_itk.data.marks import Marks

SpecialTokens = Literal["text", "allow"]
"""What names of special tokens in a record are: text like any other, or the special tokens themselves."""

_BREAK, _STAND_IN = 2, 3  # kinds of marks, beside the two of `spans.py`; a stand-in for each kind of added token
_NEAR_THE_CUT, _CHARACTERS = 1000, 8  # tokens; characters of a token


class SpecialNames:
    """The names of special tokens: where they stand in records, and tokens for a text that holds some as text.

    Args:
        backend: the tokenizer.
        names: tokens of more than one character; one character is never anything but text.
    """

    def __init__(self, backend: Tokenizer, names: Iterable[str]) -> None:
        known = {token.content: (index, token) for index, token in backend.get_added_tokens_decoder().items()}
        self._ids = {name: known[name][0] for name in sorted(set(names)) if name in known and len(name) > 1}
        self._flags = {
            name: (token.lstrip, token.rstrip, token.single_word, token.normalized)
            for name, (_, token) in known.items()
            if name in self._ids
        }
        self._kinds = sorted(set(self._flags.values()))
        self._backend = backend
        self._names = re.compile(_any_of(self._ids) or "(?!)")
        self._begins = re.compile((_any_of(self._ids, beginnings=True) or "(?!)") + r"\Z")
        self._ends = re.compile((_any_of((name[::-1] for name in self._ids), beginnings=True) or "(?!)") + r"\Z")
        self._longest = max(map(len, self._ids), default=0)
        normalized = backend.normalizer is not None and any(flags[3] for flags in self._flags.values())
        self._normalize = backend.normalizer.normalize_str if normalized else None
        self._readers: dict[Marks, tuple[Tokenizer, dict[int, int], bool]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}, "_normalize": None, "_normalizes": self._normalize is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        normalizes = state.pop("_normalizes")
        self.__dict__ |= state
        self._normalize = self._backend.normalizer.normalize_str if normalizes else None

    def within(self, texts: Sequence[str]) -> bool:
        """Whether a name stands in some texts, or could be completed by what a template writes beside one."""
        if not self._ids:
            return False
        joined = "\0".join(texts)
        if self._names.search(joined) or (self._normalize and self._names.search(self._normalize(joined))):
            return True
        size = self._longest
        return any(
            self._begins.search(text, max(0, len(text) - size)) or self._ends.search(text[size - 1 :: -1])
            for text in texts
        )

    def broken(self, value: Any, marks: Marks) -> Any:
        """A text, or a list or object of texts, with no name left whole."""
        if isinstance(value, dict):
            return {self.broken(key, marks): self.broken(item, marks) for key, item in value.items()}
        if isinstance(value, list):
            return [self.broken(item, marks) for item in value]
        if not isinstance(value, str):
            return value
        mark, size = marks[_BREAK], self._longest
        while self._names.search(value):  # again, for names may overlap
            value = self._names.sub(lambda name: f"{name[0][0]}{mark}{name[0][1:]}", value)
        before = mark if self._ends.search(value[size - 1 :: -1]) else ""
        after = mark if self._begins.search(value, max(0, len(value) - size)) else ""
        return f"{before}{value}{after}"

    def encode(
        self, text: str, positions: Sequence[int], marks: Marks, limit: int | None
    ) -> tuple[Encoding, np.ndarray, int, list[int]]:
        """Tokens of a text that was rendered from broken records.

        Args:
            text: with the marks.
            positions: characters in it.
            marks: which they are.
            limit: of the tokenizer's `encode_start`.

        Returns:
            The encoding of the text without marks, or of as many of its characters as the third says; its token ids;
            and the positions in the text without marks.

        Raises:
            ValueError: the template rewrites a mark, or the tokenizer does not read a stand-in as one token.
        """
        reader, real, cuts = self._reader(marks)
        pattern = re.compile(f"{re.escape(marks[_BREAK])}|{self._names.pattern}")
        parts, starts, shifts, written = [], [0], [0], []
        last = length = 0
        for found in pattern.finditer(text):
            new = ""
            if found[0] != marks[_BREAK]:
                written.append(self._ids[found[0]])
                new = marks[_STAND_IN + self._kinds.index(self._flags[found[0]])]
            elif cuts:
                new = found[0]
            parts += [text[last : found.start()], new]
            length += found.start() - last + len(new)
            last = found.end()
            starts.append(last)
            shifts.append(length - last)
        parts.append(text[last:])
        plain = "".join(parts)
        if json.dumps(marks[_BREAK])[1:-1] in plain:
            raise ValueError(
                "the chat template rewrites a text that holds the name of a special token, so it cannot be kept text: "
                "special_tokens: allow takes it as the special token"
            )
        moved = [position + shifts[bisect_right(starts, position) - 1] for position in positions]
        # Where breaks stay, at most a third of the tokens are breaks.
        encoding, size = encode_start(reader, plain, limit if limit is None or not cuts else 2 * limit)
        ids = np.array(encoding.ids, np.int32)
        stand_ins = np.flatnonzero(np.isin(ids, [index for index, kind in real.items() if kind >= _STAND_IN]))
        if len(stand_ins) > len(written) or size == len(plain) and len(stand_ins) < len(written):
            raise ValueError(
                "the tokenizer does not keep apart the special tokens of the template and their names in the text: "
                "special_tokens: allow takes them as the same"
            )
        ids[stand_ins] = written[: len(stand_ins)]
        return encoding, ids, size, moved

    def cut_tokens(self, encoding: Encoding, marks: Marks) -> np.ndarray:
        """Which tokens [tokens] of an encoding only cut the text and are none."""
        _, real, cuts = self._reader(marks)
        cut = [index for index, kind in real.items() if kind == _BREAK]
        return np.isin(encoding.ids, cut) if cuts else np.zeros(len(encoding), bool)

    def _reader(self, marks: Marks) -> tuple[Tokenizer, dict[int, int], bool]:
        """A tokenizer that knows marks but no special token, the marks' ids -> kinds, and whether names need a cut.

        A model whose own vocabulary holds a name (Unigram) makes it of plain text: there a break stays as a token.
        """
        if marks not in self._readers:
            if len(self._readers) > 1:
                self._readers.clear()
            content = json.loads(self._backend.to_str())
            for token in content["added_tokens"]:
                token["special"] = token["content"] in self._ids
            reader = Tokenizer.from_str(json.dumps(content))
            reader.encode_special_tokens = True
            cuts = any(index in reader.encode(name, add_special_tokens=False).ids for name, index in self._ids.items())
            kinds = {_BREAK: (False, False, False, False)} | dict(enumerate(self._kinds, _STAND_IN))
            names = ("lstrip", "rstrip", "single_word", "normalized")
            added = {
                kind: AddedToken(marks[kind], special=False, **dict(zip(names, flags, strict=True)))
                for kind, flags in kinds.items()
            }
            reader.add_tokens(list(added.values()))
            numbers = reader.get_vocab(with_added_tokens=True)
            self._readers[marks] = reader, {numbers[marks[kind]]: kind for kind in kinds}, cuts
        return self._readers[marks]


def is_short(text: str, limit: int | None) -> bool:
    """Whether a text is tokenized whole when its first `limit` tokens are wanted; None = all."""
    return limit is None or len(text) <= _CHARACTERS * (limit + _NEAR_THE_CUT)


def encode_start(tokenizer: Tokenizer, text: str, limit: int | None) -> tuple[Encoding, int]:
    """Tokens of a text, or of a beginning of it that holds its first `limit` tokens, and how many characters that is.

    What is cut off can only change the tokens near the cut: a beginning is long enough when the tokenizer makes a
    thousand tokens more of it than are asked for.
    """
    size = len(text)
    if limit is not None and not is_short(text, limit):
        enough = limit + _NEAR_THE_CUT
        size = _CHARACTERS * enough
        while size < len(text):
            encoding = tokenizer.encode(text[:size], add_special_tokens=False)
            if len(encoding) >= enough:
                return encoding, size
            size *= 4
    return tokenizer.encode(text, add_special_tokens=False), len(text)


def _any_of(words: Iterable[str], *, beginnings: bool = False) -> str:
    """A regular expression for the longest of some words, or the longest beginning of one; "" for no words."""
    following: dict[str, list[str]] = {}
    for word in filter(None, words):
        following.setdefault(word[0], []).append(word[1:])
    if not following:
        return ""
    branches = []
    for first, rest in following.items():
        more = _any_of(rest, beginnings=beginnings)
        branches.append(re.escape(first) + more + ("?" if more and (beginnings or "" in rest) else ""))
    return f"(?:{'|'.join(branches)})"
