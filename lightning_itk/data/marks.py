"""Marks: strings that stand in none of some texts, to put into them and to find again."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_HEAD, _RUNS = "\ue001", range(0xE100, 0xF900)


@dataclass(frozen=True)
class Marks:
    """Marks of different kinds that cannot be mistaken for text, for each other or for parts of each other.

    A mark is a run of one private-use character between two others. The run is longer than any in the texts, so it
    cannot stand in them, nor begin in one and end in a mark beside it.
    """

    character: str = chr(_RUNS[0])
    length: int = 1

    def __getitem__(self, kind: int) -> str:
        """The mark of a kind, from 0 to 200."""
        return f"{_HEAD}{self.character * self.length}{chr(ord(_HEAD) + 1 + kind)}"


USUAL = Marks()


def marks_for(texts: Sequence[str]) -> Marks:
    """Marks that stand in none of the texts; nearly always the usual ones."""
    if not any(USUAL.character in text for text in texts):
        return USUAL
    used = set().union(*texts)
    free = next((chr(code) for code in _RUNS if chr(code) not in used), None)
    if free is not None:
        return Marks(free)
    runs = re.compile(rf"([{chr(_RUNS[0])}-{chr(_RUNS[-1])}])\1*")
    longest = dict.fromkeys(map(chr, _RUNS), 0)
    for run in (found for text in texts for found in runs.finditer(text)):
        longest[run[1]] = max(longest[run[1]], len(run[0]))
    character = min(longest, key=longest.__getitem__)
    return Marks(character, longest[character] + 1)
