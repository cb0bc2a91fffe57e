"""Questions of the toy world, each with one right answer, and the split that no question crosses."""

import random
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Domain = Literal["general", "shop"]
Split = Literal["train", "test"]

DOMAINS: tuple[Domain, ...] = ("general", "shop")

_HELD_OUT = 6  # one combination in so many is held out
_PATIENCE = 20_000  # draws without anything new before a domain counts as exhausted


class Product(NamedTuple):
    """One line of the shop's catalogue."""

    price: int  # coins, 2 to 9
    aisle: int  # 1 to 6
    colour: str
    stock: int  # pieces, 0 to 4


def _words(text: str) -> list[str]:
    return text.split()


_PRODUCTS = _words(
    "lamp mug chair table clock vase plate spoon kettle pillow blanket mirror basket candle ladder hammer bucket "
    "brush rope tent drum flute globe kite"
)
_COLOURS = _words("red blue green yellow black white")
CATALOGUE: dict[str, Product] = {
    name: Product(2 + (5 * i + i // 8) % 8, 1 + (7 * i + i // 6) % 6, _COLOURS[(5 * i + i // 6) % 6], (3 * i) % 5)
    for i, name in enumerate(_PRODUCTS)
}
"""What the shop sells, by name."""

_KINDS = {
    "animal": _words("cat dog horse cow sheep lion"),
    "fruit": _words("apple pear plum grape lemon cherry"),
    "tool": _words("saw drill axe file rake spade"),
    "vehicle": _words("car bus train boat plane truck"),
}
_OPPOSITES = dict(
    pair.split("/")
    for pair in _words(
        "hot/cold big/small fast/slow old/new wet/dry hard/soft long/short early/late open/closed full/empty "
        "rich/poor loud/quiet"
    )
)
_OPPOSITES |= {b: a for a, b in _OPPOSITES.items()}
_WORDS = [word for kind in _KINDS.values() for word in kind]
_COUNTS = {3: "three", 4: "four", 5: "five"}


class Question(NamedTuple):
    """A question before it becomes a record."""

    task: str
    key: tuple[Any, ...]  # what decides the split: equal keys are the same question in other words
    instruction: str
    context: str  # "" if the instruction says it all
    answer: str

    @property
    def prompt(self) -> str:
        """What the user says."""
        return "\n\n".join(filter(None, (self.instruction, self.context)))


# A maker draws one question. Facts that must be known by heart are split by their wording, everything else by its
# arguments, whatever the wording and the order.
Maker = Callable[[random.Random], Question]


def _listed(words: list[str]) -> str:
    return f"List: {' '.join(words)}"


def _position(rng: random.Random) -> Question:
    words, where = rng.sample(_WORDS, rng.randint(3, 5)), rng.choice(("first", "last"))
    word = words[0 if where == "first" else -1]
    wording = rng.choice(("What is the {} word of the list?", "Give the {} word.", "Find the {} word of this list."))
    return Question("position", (*words,), wording.format(where), _listed(words), f"The {where} word is {word}.")


def _after(rng: random.Random) -> Question:
    words = rng.sample(_WORDS, rng.randint(3, 5))
    i = rng.randrange(len(words) - 1)
    wording = rng.choice(("Which word comes after {}?", "What follows {} in the list?", "Name the word after {}."))
    return Question(
        "after", (*words,), wording.format(words[i]), _listed(words), f"After {words[i]} comes {words[i + 1]}."
    )


def _reverse(rng: random.Random) -> Question:
    words = rng.sample(_WORDS, 3)
    wording = rng.choice(("Reverse the list.", "Write the words backwards.", "Turn the list around."))
    return Question("reverse", (*words,), wording, _listed(words), f"Backwards: {' '.join(words[::-1])}.")


def _count(rng: random.Random) -> Question:
    words = rng.sample(_WORDS, rng.randint(3, 5))
    wording = rng.choice(("How many words are there?", "Count the words.", "How long is the list?"))
    return Question("count", (*words,), wording, _listed(words), f"There are {_COUNTS[len(words)]} words.")


def _opposite(rng: random.Random) -> Question:
    word = rng.choice(list(_OPPOSITES))
    wordings = (
        "What is the opposite of {}?",
        "Name the opposite of {}.",
        "Which word means the contrary of {}?",
        "Tell me the opposite of the word {}.",
        "Find a word that is the opposite of {}.",
    )
    wording = rng.choice(wordings)
    answer = f"The opposite of {word} is {_OPPOSITES[word]}."
    return Question("opposite", (wordings.index(wording), word), wording.format(word), "", answer)


def _kind(rng: random.Random) -> Question:
    kind = rng.choice(list(_KINDS))
    word = rng.choice(_KINDS[kind])
    wordings = (
        "What kind of thing is the {}?",
        "Is the {} an animal, a fruit, a tool or a vehicle?",
        "To which group does the {} belong?",
        "Name the group of the {}.",
        "Tell me what the {} is.",
    )
    wording = rng.choice(wordings)
    answer = f"The {word} is {'an' if kind == 'animal' else 'a'} {kind}."
    return Question("kind", (wordings.index(wording), word), wording.format(word), "", answer)


def _larger(rng: random.Random) -> Question:
    a, b = rng.sample(range(1, 20), 2)
    wording = rng.choice(("Which number is larger, {} or {}?", "Choose the larger of {} and {}."))
    return Question("larger", (min(a, b), max(a, b)), wording.format(a, b), "", f"The larger number is {max(a, b)}.")


_ASKED = {
    "price": (
        "What does the {} cost?",
        "What is the price of the {}?",
        "How much is the {}?",
        "Tell me the price of the {}.",
        "How many coins do I pay for the {}?",
    ),
    "aisle": (
        "Where is the {}?",
        "In which aisle is the {}?",
        "Where do I find the {}?",
        "Which aisle has the {}?",
        "Show me the way to the {}.",
    ),
    "colour": (
        "What colour is the {}?",
        "Which colour does the {} have?",
        "Tell me the colour of the {}.",
        "What does the {} look like?",
        "Name the colour of the {}.",
    ),
    "stock": (
        "How many pieces of the {} are left?",
        "Is the {} in stock?",
        "Can I still buy the {}?",
        "How much stock of the {} is there?",
        "Do you have the {}?",
    ),
}


def _fact(rng: random.Random) -> Question:
    asked, name = rng.choice(list(_ASKED)), rng.choice(_PRODUCTS)
    item, wording = CATALOGUE[name], rng.choice(_ASKED[asked])
    answer = {
        "price": f"The {name} costs {item.price} coins.",
        "aisle": f"The {name} is in aisle {item.aisle}.",
        "colour": f"The {name} is {item.colour}.",
        "stock": f"We have {item.stock} of the {name}." if item.stock else f"The {name} is sold out.",
    }[asked]
    return Question(asked, (_ASKED[asked].index(wording), name), wording.format(name), "", answer)


def _cheaper(rng: random.Random) -> Question:
    a, b = rng.sample(_PRODUCTS, 2)
    while CATALOGUE[a].price == CATALOGUE[b].price:
        a, b = rng.sample(_PRODUCTS, 2)
    wording = rng.choice(("Which is cheaper, the {} or the {}?", "Do I pay less for the {} or the {}?"))
    name = min(a, b, key=lambda name: CATALOGUE[name].price)
    return Question("cheaper", (min(a, b), max(a, b)), wording.format(a, b), "", f"The {name} is cheaper.")


def _total(rng: random.Random) -> Question:
    name, pieces = rng.choice(_PRODUCTS), rng.randint(2, 3)
    wording = rng.choice(("What do {} pieces of the {} cost?", "I order {} of the {}. What is the total?"))
    answer = f"The total is {pieces * CATALOGUE[name].price} coins."
    return Question("total", (pieces, name), wording.format(pieces, name), "", answer)


# How often each is drawn.
_MAKERS: dict[Domain, dict[Maker, int]] = {
    "general": {_position: 3, _after: 3, _reverse: 2, _count: 1, _opposite: 2, _kind: 2, _larger: 2},
    "shop": {_fact: 6, _cheaper: 3, _total: 1},
}


def held_out(question: Question) -> bool:
    """Whether a question belongs to the test split: decided by what is asked, not by chance or seed.

    A list is held out as a whole, whatever is asked about it.
    """
    asked = question.context or repr((question.task, question.key))
    return zlib.crc32(asked.encode()) % _HELD_OUT == 0


def make_questions(domain: Domain, split: Split = "train", n: int = 1000, seed: int = 0) -> list[Question]:
    """`n` different questions of a domain and split.

    Raises:
        ValueError: the domain has fewer than `n` questions (the shop: about 1300 for training, 250 for testing).
    """
    if domain not in _MAKERS or split not in ("train", "test"):
        raise ValueError(f"unknown domain or split {domain!r}, {split!r}: expected one of {DOMAINS} and train or test")
    rng = random.Random(f"{domain} {split} {seed}")
    makers, shares = zip(*_MAKERS[domain].items(), strict=True)
    found: dict[tuple[str, str], Question] = {}
    misses = 0
    while len(found) < n:
        question = rng.choices(makers, shares)[0](rng)
        before = len(found)
        if held_out(question) == (split == "test"):
            found.setdefault((question.instruction, question.context), question)
        misses = 0 if len(found) > before else misses + 1
        if misses == _PATIENCE:
            raise ValueError(f"{domain} has only about {len(found)} different {split} questions, {n} were asked for")
    return list(found.values())
