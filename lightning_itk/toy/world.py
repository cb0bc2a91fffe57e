"""The toy world: a tokenizer, tiny Llama models and instruction data in two domains, made by code in about a second.

`general` holds small text tasks: words of a list, opposites, kinds of things, larger numbers. `shop` holds
questions about a fixed catalogue: price, aisle, colour, stock, what is cheaper, what an order costs. Every question
has one right answer. The held-out split asks for combinations that training never shows (another list, another pair
of numbers or products, another wording of a known fact), so rote learning does not answer it but the rule does.
"""

import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_itk.toy.questions import DOMAINS, Domain, Split, make_questions

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML (the format of Qwen's models)."""

_VOCABULARY = 640


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
    """The large model: 3 layers, 4 heads, 96 wide."""
    return make_model(tokenizer, hidden=96, layers=3, heads=4, seed=seed)


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
