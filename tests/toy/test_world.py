import json
import re
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_itk.data.records import check
from lightning_itk.toy import world as toy
from lightning_itk.toy.questions import CATALOGUE, DOMAINS, make_questions

NUMBERS = {"three": 3, "four": 4, "five": 5}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return toy.write_world(tmp_path_factory.mktemp("world"), general=300, shop=300, test=100)


def _solve(prompt: str) -> str:
    """The answer's facts, worked out anew from the words of the question."""
    words = prompt.partition("List: ")[2].split()
    numbers = [int(n) for n in re.findall(r"\d+", prompt)]
    names = [name for name in re.findall(r"\w+", prompt) if name in CATALOGUE]
    first = prompt.splitlines()[0]
    if match := re.search(r"(?:after|follows) (\w+)", first):
        return words[words.index(match[1]) + 1]
    if words and (match := re.search("first|last", first)):
        return words[0 if match[0] == "first" else -1]
    if words and re.search("How|Count", first):
        return str(len(words))
    if words:
        return " ".join(reversed(words))
    if "larger" in first:
        return str(max(numbers))
    if "cheaper" in first or "less" in first:
        return min(names, key=lambda name: CATALOGUE[name].price)
    if numbers:
        return str(numbers[0] * CATALOGUE[names[0]].price)
    item = CATALOGUE[names[0]] if names else None
    if item and re.search("colour|look", first):
        return item.colour
    if item and re.search("Where|aisle|way", first):
        return str(item.aisle)
    if item and re.search("stock|left|still|you have", first):
        return str(item.stock) if item.stock else "sold out"
    if item:
        return str(item.price)
    return ""


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right(domain, split):
    solved = 0
    for question in make_questions(domain, split, 200, seed=3):
        prompt = f"{question.instruction}\n\n{question.context}"
        expected, answer = _solve(prompt), question.answer
        if question.task == "count":
            answer = " ".join(str(NUMBERS.get(word, word)) for word in answer.split())
        if expected:
            assert expected in re.split(r"[ .]", answer) or f" {expected}." in answer, (prompt, question.answer)
        solved += bool(expected)
    assert solved > 150


@pytest.mark.parametrize("domain", DOMAINS)
def test_splits_share_no_question(domain):
    train = make_questions(domain, "train", 1200, seed=0)
    test = make_questions(domain, "test", 200, seed=1)
    assert not {(q.task, q.key) for q in train} & {(q.task, q.key) for q in test}
    assert not {(q.instruction, q.context) for q in train} & {(q.instruction, q.context) for q in test}
    assert not {q.context for q in train if q.context} & {q.context for q in test if q.context}


def test_an_order_of_the_arguments_does_not_leak():
    for task in ("larger", "cheaper"):
        domain = "shop" if task == "cheaper" else "general"
        pairs = []
        for split in ("train", "test"):
            questions = [q for q in make_questions(domain, split, 200) if q.task == task]
            names = [re.findall(r"\d+|the (\w+)", q.instruction) for q in questions]
            pairs.append({frozenset(pair) for pair in names if len(pair) == 2 and all(pair)})
        assert not pairs[0] & pairs[1]


def test_every_fact_of_the_catalogue_is_taught():
    taught = {(q.task, q.key[-1]) for q in make_questions("shop", "train", 1200)}
    for task in ("price", "aisle", "colour", "stock"):
        assert {name for t, name in taught if t == task} == set(CATALOGUE)


@pytest.mark.parametrize("domain", DOMAINS)
def test_records_come_in_every_form_and_pass_the_check(domain):
    records = toy.make_records(domain, "train", 300)
    forms = {key for record in records for key in record}
    assert forms >= {"instruction", "input", "output", "context", "response", "prompt", "completion", "messages"}
    turns = set()
    for record, question in zip(records, make_questions(domain, "train", 300), strict=True):
        messages, teacher = check(record, {})
        turns.add(len(messages))
        assert messages[-1]["content"] == question.answer
        assert messages[-2]["content"].startswith(question.instruction)
        assert messages[-2]["content"].endswith(question.context)
        assert teacher == ""
    assert turns == {2, 4}


@pytest.mark.process
def test_equal_arguments_give_equal_records_in_another_process():
    code = (
        "import hashlib, json; from lightning_itk import toy;"
        "records = [toy.make_records(d, s, 100, 5) for d in toy.DOMAINS for s in ('train', 'test')];"
        "text = json.dumps(records) + toy.make_tokenizer().backend_tokenizer.to_str();"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    namespace: dict = {}
    lines = []
    exec(code, {**namespace, "print": lines.append})
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == lines[0]
    assert toy.make_records("shop", seed=1) != toy.make_records("shop", seed=2)


def test_more_questions_than_there_are_is_one_clear_line():
    with pytest.raises(ValueError, match=r"shop has only about \d+ different test questions, 5000 were asked for"):
        make_questions("shop", "test", 5000)
    with pytest.raises(ValueError, match="unknown domain or split 'law', 'train'"):
        make_questions("law")


def test_tokenizer_round_trip():
    tokenizer = toy.make_tokenizer()
    for text in (
        "The kettle costs 5 coins.",
        "Hello, wörld!  1234\n\tdef f(x): return x",
        "日本語 🙂",
        "List: cat dog",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id}) == 2
    words = [f" {word}" for word in (*CATALOGUE, "cat", "plum", "truck")]
    assert all(len(tokenizer(word)["input_ids"]) <= 2 for word in words)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_models_load_by_path(world):
    tokenizer = AutoTokenizer.from_pretrained(world.student)
    assert tokenizer.chat_template == toy.CHAT_TEMPLATE
    batch = tokenizer("The mug", return_tensors="pt", return_token_type_ids=False)
    sizes = []
    for folder in (world.student, world.teacher):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model(**batch).logits.shape[-1] == len(tokenizer)
        sizes.append(model.num_parameters())
    assert sizes[1] > 4 * sizes[0]


def test_weights_depend_on_the_seed_alone():
    tokenizer = toy.make_tokenizer()
    torch.manual_seed(9)
    before = torch.get_rng_state()
    a, b, c = (toy.make_student(tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.get_input_embeddings().weight for model in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_files_hold_what_was_asked_for(world):
    for domain in DOMAINS:
        for files, split, n in ((world.train, "train", 300), (world.test, "test", 100)):
            lines = files[domain].read_text().splitlines()
            assert [json.loads(line) for line in lines] == toy.make_records(domain, split, n, 0)


def test_it_takes_about_a_second(tmp_path):
    start = time.process_time()
    toy.write_world(tmp_path)
    assert time.process_time() - start < 10
