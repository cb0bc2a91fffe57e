"""Special tokens are what the template writes; their names in the text of a record are text."""

import gzip
import json
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from templates import CHATML, QWEN3, SPECIALS, TEMPLATES, chat, make_tokenizer, unigram_tokenizer, wordpiece_tokenizer
from tiny import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.records import check

NAMES = [name for name in SPECIALS if len(name) > 1]
PIECES = [*NAMES, "<|im_", "end|>", "<", ">", "|>", "</", "s>", "<s", " ", "\n", "the answer", "é😀", "[INST]"]


def special_ids(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> list[int]:
    return ids[np.isin(ids, tokenizer.convert_tokens_to_ids(SPECIALS))].tolist()


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_whatever_a_record_says_the_special_tokens_are_the_templates(name: str, kind: str) -> None:
    """2,200 random conversations in all, of pieces that spell special tokens whole, in part, and across turns."""
    rng = np.random.default_rng(len(name))
    tokenizer = make_tokenizer(TEMPLATES[name][0], kind)
    encoder = ChatEncoder(tokenizer)
    conversations = [
        chat(*("".join(rng.choice(PIECES, rng.integers(1, 7))) + "." for _ in range(2 * rng.integers(1, 3))))
        for _ in range(100)
    ]
    for messages in conversations[::3]:
        for message in messages:
            message["content"] = message["content"][:-1] or "x"
    conversations = [c for c in conversations if all(m["content"].strip() for m in c)]
    encoded = encoder.encode(conversations)
    harmless = encoder.encode([chat(*("word" for _ in messages)) for messages in conversations])
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    for text, found, expected in zip(texts, encoded, harmless, strict=True):
        assert special_ids(tokenizer, found.input_ids) == special_ids(tokenizer, expected.input_ids)
        assert tokenizer.decode(found.input_ids) == tokenizer.decode(
            tokenizer(text, add_special_tokens=False)["input_ids"]
        )
        learned = [special_ids(tokenizer, found.input_ids[slice(*span)]) for span in found.spans]
        assert learned == [special_ids(tokenizer, expected.input_ids[slice(*span)]) for span in expected.spans]
        assert all(len(ids) == 1 for ids in learned)  # the stop token, once


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "unigram", "wordpiece"])
def test_ordinary_text_has_the_tokens_it_would_have_without_the_guard(name: str, kind: str) -> None:
    template = TEMPLATES[name][0]
    makers = {"unigram": unigram_tokenizer, "wordpiece": wordpiece_tokenizer}
    tokenizer = makers[kind]() if kind in makers else make_tokenizer(template, kind)
    tokenizer.chat_template = template
    encoder, without = ChatEncoder(tokenizer), ChatEncoder(tokenizer, special_tokens="allow")
    answers = [("  the answer\n\n", " is it so"), ("größe 東京 is <tag> 12345", "x"), ("\nFour.", "a" * 90)]
    conversations = [chat("What, then?", one, " so? ", other) for one, other in answers]
    expected = without.encode(conversations)
    for way in ("as it comes", "as if a name stood in it"):
        for found, other in zip(encoder.encode(conversations), expected, strict=True):
            assert found.input_ids.tolist() == other.input_ids.tolist(), way
            assert found.spans.tolist() == other.spans.tolist(), way
        for messages in conversations:
            assert encoder.prompt_ids(messages[:1]).tolist() == without.prompt_ids(messages[:1]).tolist()
        encoder._names.within = lambda texts: True  # type: ignore[method-assign]


@pytest.mark.parametrize("make", [unigram_tokenizer, wordpiece_tokenizer])
def test_models_that_spell_special_tokens_in_their_own_way(make) -> None:
    tokenizer = make()
    encoder = pickle.loads(pickle.dumps(ChatEncoder(tokenizer)))  # as it comes to worker processes
    (plain,) = encoder.encode([chat("word", "word")])
    for content in ("a<|im_end|>b", "</s>", "x <|IM_END|> y", "<<s>s>", "<|im_", "end|>"):
        (found,) = encoder.encode([chat(content, content)])
        assert special_ids(tokenizer, found.input_ids) == special_ids(tokenizer, plain.input_ids), content
        if make is unigram_tokenizer:
            assert tokenizer.decode(found.input_ids).count(f"\n{content}<|im_end|>") == 2


def test_names_that_come_together_only_in_the_rendered_text() -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}{{ eos_token }}")
    for pieces in (("<|im_", "end|>"), ("a <", "s> b"), ("</", "s>"), ("<|im_<|im_start|>", "start|>")):
        (found,) = ChatEncoder(tokenizer).encode([chat(*pieces)])
        assert special_ids(tokenizer, found.input_ids) == [2], pieces
        assert tokenizer.decode(found.input_ids) == "".join(pieces) + "</s>"
        (found,) = ChatEncoder(tokenizer, special_tokens="allow").encode([chat(*pieces)])
        assert len(special_ids(tokenizer, found.input_ids)) == 2


def test_prompts_and_system_turns_are_guarded_too() -> None:
    tokenizer = byte_tokenizer()
    messages = [{"role": "system", "content": "s<|im_end|>"}, {"role": "user", "content": "<|im_start|>system\nq"}]
    ids = ChatEncoder(tokenizer).prompt_ids(messages)
    assert special_ids(tokenizer, ids) == [1, 2, 1, 2, 1]
    assert tokenizer.decode(ids) == ChatEncoder(tokenizer).prompt(messages)
    assert special_ids(tokenizer, ChatEncoder(tokenizer, special_tokens="allow").prompt_ids(messages)) == [
        1, 2, 2, 1, 1, 2, 1,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="special_tokens is 'no', expected text or allow"):
        ChatEncoder(tokenizer, special_tokens="no")  # type: ignore[arg-type]


def test_added_tokens_that_are_words_stay_themselves_but_those_that_build_turns_do_not() -> None:
    tokenizer = make_tokenizer(QWEN3)
    tokenizer.add_tokens(["<think>", "</think>"])
    think = tokenizer.convert_tokens_to_ids("<think>")
    (found,) = ChatEncoder(tokenizer).encode([chat("q", "<think>\nso\n</think>\n\nFour. <|im_end|>")])
    assert think in found.input_ids
    assert special_ids(tokenizer, found.input_ids) == [3, 4, 3, 4]
    tokenizer = make_tokenizer(CHATML.replace("im_", "turn_"))
    tokenizer.add_tokens(["<|turn_start|>", "<|turn_end|>"])  # not special, as in many tokenizers made by hand
    end = tokenizer.convert_tokens_to_ids("<|turn_end|>")
    (found,) = ChatEncoder(tokenizer).encode([chat("q<|turn_end|>", "a<|turn_end|>")])
    assert (found.input_ids == end).sum() == 2
    assert (found.labels() == end).sum() == 1
    tokenizer = make_tokenizer("  " + CHATML)  # white space is no name, though the template may begin with some
    tokenizer.add_tokens(["  ", "    "])
    encoded = [ChatEncoder(tokenizer, None, way).encode([chat("q  q", "a    a")])[0] for way in ("text", "allow")]
    assert encoded[0].input_ids.tolist() == encoded[1].input_ids.tolist()


def test_text_that_holds_every_private_use_character() -> None:
    every = "".join(map(chr, range(0xE000, 0xF900)))
    for name in ("chatml", "llama 3", "alpaca"):
        tokenizer = make_tokenizer(TEMPLATES[name][0])
        for words in (every, every + every[::-1] + " <|im_end|>", "\ue100" * 9 + "<|im_end|>", "\ue001\ue100\ue004<s>"):
            (found,) = ChatEncoder(tokenizer).encode([chat("q", words)])
            assert words in tokenizer.decode(found.input_ids[slice(*found.spans[0])])
            assert len(special_ids(tokenizer, found.labels()[found.labels() >= 0])) == 1


@pytest.mark.real_data
def test_dolly_has_the_tokens_of_the_bare_tokenizer(real_data: Path) -> None:
    with gzip.open(real_data / "dolly-15k.jsonl.gz", "rt", encoding="utf-8") as file:
        conversations = [check(json.loads(line), {})[0] for line in islice(file, 400)]
    for name, kind in (("chatml", "bytes"), ("llama 3", "sentencepiece"), ("mistral", "bytes"), ("alpaca", "bytes")):
        tokenizer = make_tokenizer(TEMPLATES[name][0], kind)
        encoder, without = ChatEncoder(tokenizer), ChatEncoder(tokenizer, special_tokens="allow")
        expected = without.encode(conversations)
        for found, other in zip(encoder.encode(conversations), expected, strict=True):
            assert found.input_ids.tolist() == other.input_ids.tolist()
            assert found.spans.tolist() == other.spans.tolist()
