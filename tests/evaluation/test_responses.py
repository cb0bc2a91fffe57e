"""Responses do not depend on batches, padding or a kill in between, and read back as training data."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from tiny import byte_tokenizer, tiny_model

import lightning_itk as itk
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.records import DataError
from lightning_itk.data.sources import Source, read
from lightning_itk.evaluation.responses import answered, prompt_ids, prompts_fingerprint, read_prompts, write_responses
from lightning_itk.models.generation import Generator, Response

ENCODER = ChatEncoder(byte_tokenizer())
RECORDS = [{"prompt": "q" * (1 + 7 * i % 11), "note": i} for i in range(7)]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", 3, initializer_range=0.5)  # not the same token again and again


def generator(model, **options) -> Generator:
    return Generator(model, byte_tokenizer(), stops=ENCODER.stop_tokens(), **{"max_new_tokens": 6, **options})


def write(path: Path, records=RECORDS) -> Source:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Source(str(path))


@torch.no_grad()
def by_hand(model, ids, new: int) -> list[int]:
    ids = torch.from_numpy(ids).long()[None]
    for _ in range(new):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, -new:].tolist()


def test_answers_are_the_models_own_whatever_the_batch(model, tmp_path):
    made, prompts = generator(model), read_prompts(write(tmp_path / "p.jsonl"))
    ids = prompt_ids(ENCODER, prompts, made)
    assert made.tokenizer.decode(ids[0]) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    together, alone = made.answer(ids), [made.answer([prompt])[0] for prompt in ids]
    assert together == alone
    for prompt, response in zip(ids, alone, strict=True):
        expected = by_hand(model, prompt, 6)
        end = next((i for i, token in enumerate(expected) if token in made.stops), 6)
        assert response.text == made.tokenizer.decode(expected[:end], skip_special_tokens=True).strip()
        assert response.finished == (end < 6)
    assert len({response.text for response in alone}) > 1


def test_an_answer_ends_at_the_templates_stop_token(model):
    tokenizer = byte_tokenizer()
    made = generator(model)
    assert made.stops == [2]
    text = [*tokenizer("ab")["input_ids"], 2, *tokenizer("c")["input_ids"]]
    assert made._response(text) == Response("ab", True)
    assert made._response(text[:2]) == Response("ab", False)
    tokenizer = byte_tokenizer(("<eos>",))
    encoder = ChatEncoder(tokenizer)
    tokenizer.eos_token = "<eos>"  # the template goes on writing <|im_end|>
    assert Generator(model, tokenizer, stops=encoder.stop_tokens()).stops == [2, len(tokenizer) - 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_killed_run_continues(model, tmp_path, temperature):
    source, made = write(tmp_path / "p.jsonl"), generator(model, temperature=temperature, seed=3)
    prompts, settings = read_prompts(source), {"temperature": temperature}
    whole = tmp_path / "whole.jsonl"
    write_responses(made, ENCODER, source, prompts, whole, settings, teacher="t", batch_size=2)
    assert [json.loads(line)["record"] for line in whole.read_text().splitlines()] == list(range(7))
    assert not (tmp_path / "whole.jsonl.partial").exists()

    output, partial = tmp_path / "new" / "out.jsonl", tmp_path / "new" / "out.jsonl.partial"

    def kill(done: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_responses(made, ENCODER, source, prompts, output, settings, teacher="t", batch_size=2, progress=kill)
    assert not output.exists()
    assert len(partial.read_bytes().splitlines()) == 5
    partial.write_bytes(partial.read_bytes()[:-9])  # the last line is half written
    asked: list[int] = []
    answer = made.answer
    made.answer = lambda ids, number=0: asked.append(number) or answer(ids, number)
    with pytest.raises(ValueError, match=r"begun with temperature .*, now it is 0.5: use the same settings"):
        write_responses(made, ENCODER, source, prompts, output, {"temperature": 0.5}, teacher="t", batch_size=2)
    write_responses(made, ENCODER, source, prompts, output, settings, teacher="t", batch_size=2)
    assert asked == [1, 2, 3]
    assert output.read_bytes() == whole.read_bytes()
    assert not partial.exists()
    with pytest.raises(ValueError, match=r"out\.jsonl: exists already"):
        write_responses(made, ENCODER, source, prompts, output, settings, teacher="t")
    partial.write_text("something else\n")
    output.unlink()
    with pytest.raises(ValueError, match="no unfinished output of this command"):
        write_responses(made, ENCODER, source, prompts, output, settings, teacher="t")


@pytest.mark.parametrize(
    ("record", "columns", "expected"),
    [
        ({"instruction": "a", "input": "b", "output": "old", "x": 1}, None, {"instruction": "a", "input": "b", "x": 1}),
        ({"frage": "a", "antwort": "old"}, {"instruction": "frage", "response": "antwort"}, {"instruction": "a"}),
        ({"system": "s", "prompt": "a", "is_domain": 1}, None, {"system": "s", "prompt": "a"}),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "old"}], "x": 1},
            None,
            {"x": 1, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "new"}]},
        ),
        (
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]},
            None,
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]},
        ),
    ],
)
def test_records_read_back_as_the_prompt_and_the_response(tmp_path, record, columns, expected):
    source = write(tmp_path / "p.jsonl", [record])
    source.columns = columns
    (prompt,) = read_prompts(source)
    made = answered(prompt, columns or {}, Response("new", True), "big")
    rest = {"teacher": "big", "finished": True, "record": 0}
    assert made == {**expected, **({} if "messages" in expected else {"response": "new"}), **rest}
    (again,) = read(write(tmp_path / "out.jsonl", [made]))
    assert again.messages == [*prompt.record.messages, {"role": "assistant", "content": "new"}]
    assert again.teacher == "big"


def test_prompts_and_their_limit(model, tmp_path):
    source = write(tmp_path / "p.jsonl")
    assert len(read_prompts(source)) == 7
    assert [prompt.record.number for prompt in read_prompts(source, 2)] == [0, 1]
    assert prompts_fingerprint(read_prompts(source, 2)) != prompts_fingerprint(read_prompts(source))
    long = read_prompts(write(tmp_path / "long.jsonl", [{"prompt": "q"}, {"prompt": "q" * 120}]))
    with pytest.raises(DataError, match=r"long\.jsonl line 2: 139 prompt tokens and 6 new ones are more than the 128"):
        prompt_ids(ENCODER, long, generator(model))
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"seed": -1}):
        with pytest.raises(ValueError, match="must be at least 1, temperature and seed not negative"):
            generator(model, **wrong)


def test_predict_answers_as_generate_does(model, tmp_path):
    """One loop and one rule for where an answer ends: here the template's, which is not the tokenizer's EOS."""
    tokenizer = byte_tokenizer(("<eos>",))
    encoder = ChatEncoder(tokenizer)
    tokenizer.eos_token = "<eos>"
    student = tiny_model("llama", 3, initializer_range=0.5, vocab_size=300)
    with torch.no_grad():
        student.lm_head.weight[2] *= 2  # answers that end
    source = write(tmp_path / "p.jsonl")
    train = write(tmp_path / "train.jsonl", [{"prompt": "q", "completion": "a"}]).path
    options = {"validation": 0, "tokenizer": tokenizer, "batch_size": 3, "num_proc": 1, "cache_dir": tmp_path}
    data = itk.InstructionDataModule(train, predict=source.path, **options)
    module = itk.SFTModule(student, max_new_tokens=12)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    predicted = dict(answer for batch in trainer.predict(module, datamodule=data) for answer in batch)
    made = Generator(student, tokenizer, stops=encoder.stop_tokens(), max_new_tokens=12)
    prompts = read_prompts(source)
    expected = [made.answer([ids])[0] for ids in prompt_ids(encoder, prompts, made)]
    assert predicted == {i: response.text for i, response in enumerate(expected)}
    assert made.stops == [2, len(tokenizer) - 1]
    assert any(response.finished and response.text for response in expected)
