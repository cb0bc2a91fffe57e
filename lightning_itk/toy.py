"""The toy world: a tokenizer, tiny Llama models and instruction data in two domains, made by code in about a second.

`general` holds small text tasks: words of a list, opposites, kinds of things, larger numbers. `shop` holds
questions about a fixed catalogue: price, aisle, colour, stock, what is cheaper, what an order costs. Every question
has one right answer. The held-out split asks for combinations that training never shows (another list, another pair
of numbers or products, another wording of a known fact), so rote learning does not answer it but the rule does.
"""

import json
import random
import zlib
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Domain = Literal["general", "shop"]
Split = Literal["train", "test"]

DOMAINS: tuple[Domain, ...] = ("general", "shop")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML (the format of Qwen's models)."""

_VOCABULARY = 640
_HELD_OUT = 6  # one combination in so many is held out


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
    for _ in range(100 * n + 1000):
        if len(found) == n:
            break
        question = rng.choices(makers, shares)[0](rng)
        if held_out(question) == (split == "test"):
            found.setdefault((question.instruction, question.context), question)
    if len(found) < n:
        raise ValueError(f"{domain} has only about {len(found)} different {split} questions, {n} were asked for")
    return list(found.values())


def make_records(domain: Domain, split: Split = "train", n: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """Instruction records of one domain, in all the forms that the kit reads.

    Args:
        domain: general or shop.
        split: train or test; they share no question.
        n: how many.
        seed: of the choice; equal arguments give equal records.

    Returns:
        Alpaca, Dolly, prompt/completion and messages records, mixed; a few conversations have two turns.
    """
    rng = random.Random(f"form {seed}")
    questions = make_questions(domain, split, n, seed)
    records = []
    for question in questions:
        form = rng.choice(("alpaca", "dolly", "completion", "messages", "messages"))
        if form == "alpaca":
            record: dict[str, Any] = {"instruction": question.instruction, "input": question.context}
            record["output"] = question.answer
        elif form == "dolly":
            record = {"instruction": question.instruction, "context": question.context, "response": question.answer}
        elif form == "completion":
            record = {"prompt": question.prompt, "completion": question.answer}
        else:
            turns = [(question.prompt, question.answer)]
            if split == "train" and rng.random() < 0.2:
                other = rng.choice(questions)
                turns.insert(0, (other.prompt, other.answer))
            record = {
                "messages": [
                    {"role": role, "content": text}
                    for turn in turns
                    for role, text in zip(("user", "assistant"), turn, strict=True)
                ]
            }
        records.append({"task": question.task, **record})
    return records


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the toy texts, with pad and end tokens and a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _texts() -> Iterator[str]:
    for role in ("user", "assistant", "system"):
        yield f"{role}\n" * 100
    for domain in DOMAINS:
        for question in make_questions(domain, "train", 1200):
            yield question.instruction
            if question.context:
                yield f"\n\n{question.context}"
            yield question.answer


def make_model(tokenizer: PreTrainedTokenizerFast, *, hidden: int, layers: int, heads: int, seed: int) -> Any:
    """A Llama model with random weights, in float32, for the vocabulary of a tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def make_student(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """The small model: 2 layers, 2 heads, 48 wide."""
    return make_model(tokenizer, hidden=48, layers=2, heads=2, seed=seed)


def make_teacher(tokenizer: PreTrainedTokenizerFast, seed: int = 1) -> LlamaForCausalLM:
    """The large model: 4 layers, 4 heads, 128 wide."""
    return make_model(tokenizer, hidden=128, layers=4, heads=4, seed=seed)


class World(NamedTuple):
    """Where `write_world` put things."""

    student: Path  # model and tokenizer
    teacher: Path  # model and tokenizer, untrained
    train: dict[str, Path]  # domain -> JSON Lines
    test: dict[str, Path]


def write_world(folder: str | Path, *, general: int = 1500, shop: int = 1200, test: int = 200, seed: int = 0) -> World:
    """Write the toy world: two untrained models with their tokenizer, and data files of both domains.

    Args:
        folder: made if needed.
        general: training records of this domain.
        shop: training records of this domain.
        test: held-out records of each domain.
        seed: of the models' weights and the choice of records.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    for name, model in (("student", make_student(tokenizer, seed)), ("teacher", make_teacher(tokenizer, seed + 1))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    files: dict[str, dict[str, Path]] = {"train": {}, "test": {}}
    splits: tuple[Split, ...] = ("train", "test")
    for domain, split in product(DOMAINS, splits):
        n = test if split == "test" else {"general": general, "shop": shop}[domain]
        path = folder / f"{domain}-{split}.jsonl"
        lines = (json.dumps(record) + "\n" for record in make_records(domain, split, n, seed))
        path.write_text("".join(lines), encoding="utf-8")
        files[split][domain] = path
    return World(folder / "student", folder / "teacher", files["train"], files["test"])
