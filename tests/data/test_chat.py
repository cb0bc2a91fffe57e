import numpy as np
import pytest
from templates import CHATML, GEMMA, QWEN3, TEMPLATES, ZEPHYR, chat, learned_texts, make_tokenizer, unigram_tokenizer

from lightning_itk.batch import IGNORE_INDEX
from lightning_itk.data import special_tokens
from lightning_itk.data.chat import ChatEncoder, Encoded
from lightning_itk.data.records import check
from lightning_itk.data.template import ALPACA_TEMPLATE, ensure_chat_template

ANSWERS = [
    ("plain words",),
    ("first answer", "second answer, longer", "third"),
    ("  leading and trailing  ",),
    ("\n\nstarts with lines\n", " one"),
    ("größe 東京 😀 e\u0301",),
    ("holds <|im_end|> and </s> inside", "and [INST] too"),
    ("our own marks \uf4f0 and \uf4f1 inside",),
    ("x",),
    ("ends with a stop </s>",),
    ("same", "same"),
]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answers", ANSWERS)
def test_learned_tokens_are_the_answers_and_their_stops(name: str, kind: str, answers: tuple[str, ...]) -> None:
    template, stop, trims, before = TEMPLATES[name]
    tokenizer = make_tokenizer(template, kind)
    encoder = ChatEncoder(tokenizer)
    messages = chat(*(text for answer in answers for text in ("What, then?", answer)))
    encoded = encoder.encode([messages])[0]
    texts = learned_texts(tokenizer, encoded)
    assert len(texts) == len(answers)
    for text, answer in zip(texts, answers, strict=True):
        expected = (answer.strip() if trims else answer) + stop
        # One character of the template may share a token with the answer's beginning: "Ġword", or "\n\n".
        assert text.endswith(expected)
        assert text.removesuffix(expected) in {"", before, "\n" if answer.startswith("\n") else ""}
    # The tokens are those of the template itself, but for special tokens in the text.
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(encoded.input_ids) == tokenizer.decode(
        tokenizer(rendered, add_special_tokens=False)["input_ids"]
    )
    as_they_are = ChatEncoder(tokenizer, special_tokens="allow").encode([messages])[0].input_ids.tolist()
    assert as_they_are == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert (encoded.input_ids.tolist() == as_they_are) == ("</s>" not in "".join(answers))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_what_training_shows_before_the_answer(name: str) -> None:
    template, _, _, before = TEMPLATES[name]
    encoder = ChatEncoder(make_tokenizer(template))
    text, spans = encoder.render([chat("Why?", "Because.")])[0]
    prompt = encoder.prompt(chat("Why?"))
    assert text[: spans[-1][0]] == prompt + before
    ids = encoder.encode([chat("Why?", "Because.")])[0].input_ids
    assert encoder.prompt_ids(chat("Why?")).tolist() == ids[: len(encoder.prompt_ids(chat("Why?")))].tolist()


@pytest.mark.parametrize("name", ["chatml marked", "alpaca"])
def test_agrees_with_the_assistant_mask_of_transformers(name: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name][0])
    messages = chat("Why is it so?", "Because it is.", "Really?", "yes ")
    encoded = ChatEncoder(tokenizer).encode([messages])[0]
    ids, labels = encoded.input_ids, encoded.labels()
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert ids.tolist() == theirs["input_ids"]
    assert (labels != IGNORE_INDEX).astype(int).tolist() == theirs["assistant_masks"]
    assert (labels[labels != IGNORE_INDEX] == ids[labels != IGNORE_INDEX]).all()


def test_thinking_blocks_are_learned_where_the_template_writes_them() -> None:
    tokenizer = make_tokenizer(QWEN3)
    encoder = ChatEncoder(tokenizer)
    plain = encoder.encode([chat("One?", "First.", "Two?", "Second.")])[0]
    assert learned_texts(tokenizer, plain) == ["First.<|im_end|>", "<think>\n\n</think>\n\nSecond.<|im_end|>"]
    thought = encoder.encode([chat("One?", "<think>\na\n</think>\n\nFirst.", "Two?", "<think>\nb\n</think>\n\nNo.")])[0]
    assert learned_texts(tokenizer, thought) == ["First.<|im_end|>", "<think>\nb\n</think>\n\nNo.<|im_end|>"]


def test_system_turns() -> None:
    system = [{"role": "system", "content": ""}]
    for name in ("chatml", "llama 3", "zephyr", "alpaca"):
        template, stop, _, _ = TEMPLATES[name]
        tokenizer = make_tokenizer(template)
        encoded = ChatEncoder(tokenizer).encode([system + chat("q", "answer")])[0]
        assert learned_texts(tokenizer, encoded) == ["answer" + stop]
    with pytest.raises(ValueError, match="System role not supported"):
        ChatEncoder(make_tokenizer(GEMMA)).encode([system + chat("q", "a")])


def test_eos_is_appended_where_the_template_has_no_stop() -> None:
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tokenizer = make_tokenizer(bare)
    encoded = ChatEncoder(tokenizer).encode([chat("q", "one", "q", "two")])[0]
    assert [text.strip() for text in learned_texts(tokenizer, encoded)] == ["one", "two</s>"]
    # A stop that this tokenizer knows only as plain text is learned as text, then EOS.
    tokenizer = make_tokenizer(CHATML.replace("im_", "xx_"))
    encoded = ChatEncoder(tokenizer).encode([chat("q", "one", "q", "two")])[0]
    assert learned_texts(tokenizer, encoded) == ["one<|xx_end|>", "two<|xx_end|></s>"]
    tokenizer = make_tokenizer(bare)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no stop token and the tokenizer has no EOS"):
        ChatEncoder(tokenizer).encode([chat("q", "a")])


def test_a_template_that_rewrites_answers_is_refused() -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | upper + m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="put {% generation %}"):
        ChatEncoder(make_tokenizer(template)).encode([chat("q", "a b c", "q", "other")])


def test_ensure_chat_template() -> None:
    tokenizer = make_tokenizer(bos=True)
    ensure_chat_template(tokenizer)
    assert tokenizer.chat_template == "{{ bos_token }}" + ALPACA_TEMPLATE
    assert tokenizer.pad_token == "</s>"
    assert len(tokenizer) == len(make_tokenizer())
    encoder = ChatEncoder(tokenizer)
    text = encoder.prompt(chat("Add 2 and 2."))
    assert text.startswith("<s>Below is an instruction")
    assert text.endswith("### Instruction:\nAdd 2 and 2.\n\n### Response:")
    tokenizer = make_tokenizer()
    ensure_chat_template(tokenizer)
    assert tokenizer.chat_template == ALPACA_TEMPLATE
    tokenizer.eos_token = tokenizer.chat_template = None
    with pytest.raises(ValueError, match="neither a chat template nor an EOS"):
        ensure_chat_template(tokenizer)


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow is not a fast tokenizer"):
        ChatEncoder(Slow())  # type: ignore[arg-type]


def test_truncation_and_padding_of_the_tokenizer_file_are_off() -> None:
    tokenizer = make_tokenizer(CHATML)
    expected = ChatEncoder(tokenizer).encode([chat("q", "a longer answer")])[0]
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    np.testing.assert_array_equal(
        ChatEncoder(tokenizer).encode([chat("q", "a longer answer")])[0].input_ids, expected.input_ids
    )


def test_truncated() -> None:
    encoded = Encoded(np.arange(10, dtype=np.int32), np.array([[2, 4], [6, 9]], np.int32))
    assert encoded.truncated(20).spans.tolist() == [[2, 4], [6, 9]]
    assert encoded.truncated(7).spans.tolist() == [[2, 4], [6, 7]]
    assert encoded.truncated(6).spans.tolist() == [[2, 4]]
    assert encoded.truncated(2).spans.tolist() == []
    # The first token is never predicted.
    assert Encoded(np.arange(3), np.array([[0, 1]])).truncated(3).spans.tolist() == []
    assert Encoded(np.arange(3), np.array([[0, 3]])).truncated(3).labels().tolist() == [IGNORE_INDEX, 1, 2]


def test_fingerprint_follows_the_tokenizer_and_the_template() -> None:
    base = ChatEncoder(make_tokenizer(CHATML)).fingerprint()
    assert base == ChatEncoder(make_tokenizer(CHATML)).fingerprint()
    assert base != ChatEncoder(make_tokenizer(ZEPHYR)).fingerprint()
    assert base != ChatEncoder(make_tokenizer(CHATML), special_tokens="allow").fingerprint()
    assert base != ChatEncoder(make_tokenizer(CHATML, "sentencepiece")).fingerprint()


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_that_are_not_learned_and_ends_that_are_not(name: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name][0])
    encoder = ChatEncoder(tokenizer)
    messages = chat("Why?", "Because.", "Really?", "Yes, it")
    whole = encoder.encode([messages])[0]
    messages[-1]["learn"] = "words"
    cut = encoder.encode([messages])[0]
    assert learned_texts(tokenizer, cut)[-1].endswith("Yes, it")
    assert learned_texts(tokenizer, cut)[:-1] == learned_texts(tokenizer, whole)[:-1]
    messages[1]["learn"] = "nothing"
    last = encoder.encode([messages])[0]
    assert learned_texts(tokenizer, last) == learned_texts(tokenizer, cut)[1:]
    assert last.input_ids.tolist() == cut.input_ids.tolist()
    common = min(len(cut.input_ids), len(whole.input_ids))  # an EOS is not even written where the template writes none
    assert cut.input_ids[:common].tolist() == whole.input_ids[:common].tolist()


# As https://github.com/tatsu-lab/stanford_alpaca/blob/main/train.py has them.
PROMPT_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PROMPT_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_the_fallback_is_stanfords_prompt(kind: str) -> None:
    tokenizer = make_tokenizer(kind=kind)
    encoder = ChatEncoder(tokenizer)
    assert encoder.template_origin == "the Alpaca prompt, as the tokenizer has no other"
    for record in (
        {"instruction": "Add\nthem ", "input": " 2\n\n3", "output": "5"},
        {"instruction": "Add\n\n2", "input": "", "output": "x"},
        {"instruction": "{{ 1 }}</s>", "context": "### Response:", "output": "y</s>"},
    ):
        fields = {"input": record.get("context", ""), **record}
        prompt = (PROMPT_INPUT if fields["input"] else PROMPT_NO_INPUT).format_map(fields)
        messages, _ = check(record, {})
        text, (span,) = encoder.render([messages])[0]
        assert (text[: span[0]], text[span[0] :]) == (prompt, record["output"] + "</s>")
        assert encoder.prompt(messages[:1]) == prompt
        (encoded,) = encoder.encode([messages])
        assert learned_texts(tokenizer, encoded)[0].endswith(record["output"] + "</s>")
        ids = encoder.prompt_ids(messages[:1]).tolist()
        assert ids == encoded.input_ids[: len(ids)].tolist()
    # Other templates see one text, and the digest of such a record is what it was.
    assert ChatEncoder(make_tokenizer(CHATML)).prompt(messages[:1]).count("{{ 1 }}</s>\n\n### Response:<|im_end|>") == 1


def test_many_turns_under_the_alpaca_prompt() -> None:
    encoder = ChatEncoder(make_tokenizer())
    first, _ = check({"instruction": "a", "input": "b", "output": "c"}, {})
    text, spans = encoder.render([[{"role": "system", "content": "s"}, *first, *chat("d", "e")]])[0]
    assert text == (
        "s\n\n### Instruction:\na\n\n### Input:\nb\n\n### Response:c</s>\n\n### Instruction:\nd\n\n### Response:e</s>"
    )
    assert [text[start:end] for start, end in spans] == ["c</s>", "e</s>"]


@pytest.mark.parametrize("name", ["chatml", "chatml marked", "llama 3", "mistral", "alpaca"])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "unigram"])
def test_only_the_beginning_of_a_long_text_is_tokenized(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens, spans and reasons as of the whole text, wherever the cut falls."""
    tokenizer = unigram_tokenizer() if kind == "unigram" else make_tokenizer(None, kind)
    tokenizer.chat_template = TEMPLATES[name][0]
    encoder = ChatEncoder(tokenizer)
    words, run = "the answer is four, <b> größe 東京 123 " * 200, "ab" * 4000
    conversations = [
        chat("q", words),
        chat(words, "a"),
        chat("q", run),
        chat(*("q w", "a <|im_end|> b") * 300),
        chat("q", "</s>" * 3000, "q", "a"),
        chat("q", "a"),
    ]
    whole = encoder.encode(conversations)
    monkeypatch.setattr(special_tokens, "_NEAR_THE_CUT", 40)
    for characters in (2, 3):
        monkeypatch.setattr(special_tokens, "_CHARACTERS", characters)
        for limit in (2, 50, 333):
            for long, short in zip(whole, encoder.encode(conversations, limit), strict=True):
                assert len(short.input_ids) <= limit + 1
                assert len(short.spans) == len(long.spans)
                assert (len(short.input_ids) > limit) == (len(long.input_ids) > limit)
                for one, other in zip(short.truncated(limit), long.truncated(limit), strict=True):
                    assert one.tolist() == other.tolist()
            ids = encoder.prompt_ids(conversations[1][:1], limit).tolist()
            assert ids == encoder.prompt_ids(conversations[1][:1]).tolist()[: limit + 1]
