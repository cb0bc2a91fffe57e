"""The commands end to end through `cli.main`: what they write, and one line for everything the user gets wrong."""

import copy
import gzip
import json
import os
import shutil
from pathlib import Path

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from commands import RECORDS, choose, generate, lines, refused, responses, select
from tiny import byte_tokenizer, ragged_samples, reward_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_itk as itk
from lightning_itk import cli
from lightning_itk.batch import Sample, model_inputs, next_token_labels, pad
from lightning_itk.choice.rewards import RewardModel
from lightning_itk.cli import select as select_command
from lightning_itk.cli.records import index_records
from lightning_itk.data import InstructionDataModule
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.sources import Source
from lightning_itk.models.loading import LoRA
from lightning_itk.selection import clusters
from lightning_itk.toy import world as toy


def test_fingerprint_is_the_data_modules(tmp_path):
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz")]
    Path(files[0]).write_text("".join(json.dumps(r) + "\n" for r in RECORDS[:9]))
    with gzip.open(files[1], "wt") as file:
        file.write("".join(json.dumps(r) + "\n" for r in RECORDS[9:]))
    data = InstructionDataModule(files, tokenizer=byte_tokenizer(), max_length=40, num_proc=1, cache_dir=str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    found = index_records([Source(path) for path in files])
    assert (found.fingerprint, found.count, found.source) == (data.fingerprint, 40, [9, 31])


def test_select_writes_the_records_as_they_are(scored, capsys):
    assert cli.main(select(scored, "--fraction", 0.2)) == 0
    chosen = scored / "out" / "chosen.jsonl"
    original = (scored / "data.jsonl").read_text().splitlines()
    expected = [i for i in range(1, 40) if i not in (7, 8)][: round(0.2 * 37)]
    assert chosen.read_text().splitlines() == [original[i].strip() for i in expected]
    assert (scored / "out" / "chosen.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    for part in ("opt-350m", "40, scored 38", "1, 1 without response", "7, lowest lp_app", "longest responses"):
        assert part in said, said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--metric", "length", "--order", "highest", "--fraction", 0.1], [36, 37, 38, 39]),
        (["--clusters", "kind", "--fraction", 0.1], [1, 2, 3, 4]),
        (["--metric", "loss", "--fraction", 1], [i for i in range(1, 40) if i not in (7, 8)]),
    ],
)
def test_select_by(scored, options, expected):
    assert cli.main(select(scored, *options)) == 0
    assert [len(r["response"]) - 1 for r in lines(scored / "out" / "chosen.jsonl")] == expected


def test_select_random_depends_on_the_seed(scored):
    found = []
    for seed in (0, 0, 1):
        more = ("--metric", "random", "--fraction", 0.5, "--seed", seed, "--overwrite", "true")
        assert cli.main(select(scored, *more)) == 0
        found.append(lines(scored / "out" / "chosen.jsonl"))
    assert found[0] == found[1] != found[2]
    assert len(found[2]) == round(0.5 * 37)


@pytest.mark.parametrize("count", [3, 100])
def test_select_makes_clusters_and_keeps_them(scored, monkeypatch, count):
    pytest.importorskip("sklearn")
    texts: list[str] = []

    def embed(given, model, progress):
        texts.extend(given)
        return np.random.default_rng(0).normal(size=(len(given), 4)).astype(np.float32)

    monkeypatch.setattr(select_command, "embed", embed)
    assert cli.main(select(scored, "--clusters", count, "--fraction", 0.3)) == 0
    assert len(texts) == 37
    assert texts[0] == clusters.cluster_text("Frage 1 ä", "xx")
    first = lines(scored / "out" / "chosen.jsonl")
    assert len(first) == round(0.3 * 37)
    kept = scored / "out" / "chosen.clusters.parquet"
    assert cli.main(select(scored, "--clusters", kept, "--fraction", 0.3, "--overwrite", "true")) == 0
    assert lines(scored / "out" / "chosen.jsonl") == first


def test_select_refuses(scored, capsys):
    other = scored / "other.jsonl"
    other.write_text("".join(json.dumps(r) + "\n" for r in reversed(RECORDS)))
    assert "made on other records or in another order" in refused(capsys, *select(scored, "--data", other))
    assert "no such scores file" in refused(capsys, *select(scored, "--scores", scored / "none.parquet"))
    assert "no such file" in refused(capsys, *select(scored, "--data", scored / "none.jsonl"))
    assert "fraction must be above 0" in refused(capsys, *select(scored, "--fraction", 0))
    assert "clusters at least 1" in refused(capsys, *select(scored, "--clusters", 0))
    assert "Expected a typing.Literal['lp_app'" in refused(capsys, *select(scored, "--metric", "luck"))
    assert "scores" in refused(capsys, "select", "--data", other)
    assert "nothing is chosen" in refused(capsys, *select(scored, "--fraction", 0.001))
    assert "lp needs losses" in refused(capsys, *select(scored, "--metric", "lp"))
    assert "no column 'topic' to cluster by" in refused(capsys, *select(scored, "--clusters", "topic"))
    assert "is the data itself" in refused(capsys, *select(scored, "--output", scored / "data.jsonl"))
    assert "cannot be written" in refused(capsys, *select(scored, "--output", scored / "data.jsonl" / "x"))
    assert "not a Parquet file" in refused(capsys, *select(scored, "--scores", other))
    pq.write_table(pa.table({"record": [1, 2], "cluster": [0, 0]}), scored / "plain.parquet")
    assert "not a scores file" in refused(capsys, *select(scored, "--scores", scored / "plain.parquet"))
    clusters.write_clusters(scored / "theirs.parquet", [1, 2], [0, 0], "of other records")
    assert "made on other records" in refused(capsys, *select(scored, "--clusters", scored / "theirs.parquet"))
    assert "no such file" in refused(capsys, *select(scored, "--clusters", scored / "none.parquet"))
    assert "differ in columns or teacher" in refused(
        capsys, *select(scored, "--data", f'[{{"path": {scored}/data.jsonl, "teacher": "a"}}, {other}]')
    )
    other.write_text('{"instruction": "a", "response": 3}\n')
    assert "other.jsonl line 1: field 'response' is a number" in refused(capsys, *select(scored, "--data", other))
    assert not (scored / "out").exists()
    assert len(lines(scored / "data.jsonl")) == 40


def test_generate(model_folder, prompts, capsys):
    model = model_folder("llama", 3, initializer_range=0.5)
    assert cli.main(generate(model, prompts, "--limit", "3", "--teacher", "big")) == 0
    made = lines(prompts / "out.jsonl")
    assert [r["prompt"] for r in made] == ["p0", "p1", "p2"]
    assert {r["teacher"] for r in made} == {"big"}
    assert "wrote 3 responses" in capsys.readouterr().out


def test_generate_refuses(model_folder, prompts, capsys):
    model = model_folder("llama", 3, initializer_range=0.5)
    assert "'none/x/y' does not exist" in refused(capsys, *generate("none/x/y", prompts))
    assert "no such file" in refused(capsys, *generate(model, prompts, "--prompts", "none.jsonl"))
    assert "limit must be at least 1" in refused(capsys, *generate(model, prompts, "--limit", 0))
    assert "temperature" in refused(capsys, *generate(model, prompts, "--temperature", -1))
    assert "more than the 128 positions" in refused(capsys, *generate(model, prompts, "--max_new_tokens", 127))
    assert "device 'abacus' cannot be used" in refused(capsys, *generate(model, prompts, "--device", "abacus"))
    assert "neither a Jinja template nor" in refused(capsys, *generate(model, prompts, "--chat_template", "none.jinja"))
    (prompts / "out.jsonl.partial").write_text('{"model": "another"}\n')
    assert "was begun with batch_size None, now it is 2" in refused(capsys, *generate(model, prompts))
    (prompts / "out.jsonl").write_text("")
    assert "out.jsonl: exists already" in refused(capsys, *generate(model, prompts))
    (prompts / "prompts.jsonl").write_text('{"response": "a"}\n')
    (prompts / "out.jsonl").unlink()
    assert "prompts.jsonl line 1: no prompt" in refused(capsys, *generate(model, prompts))


def test_choose_teacher_matches_prompts_and_saves_the_table(model_folder, tmp_path, capsys):
    student = model_folder("llama", 3, initializer_range=0.5)
    answers = ["ab", "cde", "f", "gh"]
    a = responses(tmp_path / "a.jsonl", answers, [1, 2, 3, 4])
    b = responses(tmp_path / "b.jsonl", answers, [1, 2, 3, 4], order=[2, 0, 3, 1])
    c = responses(tmp_path / "c.jsonl", answers, [9, 9, 9, 9])
    assert cli.main(choose(student, "--output", tmp_path / "t" / "table.json", a=a, b=b, c=c)) == 0
    said = capsys.readouterr().out
    assert "c is the best teacher for this student by CAR" in said
    assert "a cannot be told apart from b" in said
    table = json.loads((tmp_path / "t" / "table.json").read_text())
    assert [row["teacher"] for row in table["teachers"]] == ["c", "a", "b"]
    for row, reward in zip(table["teachers"], (9, 2.5, 2.5), strict=True):
        assert (row["reward"], row["length"], row["prompts"]) == (reward, 3.0, 4)
        assert row["car"] == pytest.approx(reward / (1 + 3 * row["loss"]))
    assert table["beta"] == 3.0
    assert table["rewards"] == "column reward"
    assert table["verdicts"] == [
        "c is the best teacher for this student by CAR",
        "a cannot be told apart from b",
    ]


def test_choose_teacher_with_a_reward_model(model_folder, tmp_path):
    student, answers = model_folder("llama", 3, initializer_range=0.5), ["ab", "cde", "f", "gh"]
    a, b = responses(tmp_path / "a.jsonl", answers), responses(tmp_path / "b.jsonl", ["x", "y", "z", "w"])
    judge = reward_model(tmp_path / "judge")
    more = ("--reward_model", judge, "--shift", "auto", "--output", tmp_path / "table.json", "--beta", "1")
    assert cli.main(choose(student, *more, a=a, b=b)) == 0
    rows = {row["teacher"]: row for row in json.loads((tmp_path / "table.json").read_text())["teachers"]}
    turns = [[("user", f"p{i}"), ("assistant", answer)] for i, answer in enumerate([*answers, "x", "y", "z", "w"])]
    numbers = [i % 4 for i in range(8)]
    turns = [[("user", f"p{n}"), turn[1]] for n, turn in zip(numbers, turns, strict=True)]
    rewards = RewardModel(judge)([[{"role": r, "content": c} for r, c in turn] for turn in turns])
    shift = max(0, -rewards[:4].mean(), -rewards[4:].mean())
    assert rows["a"]["reward"] == pytest.approx(rewards[:4].mean() + shift, abs=1e-5)
    assert rows["b"]["reward"] == pytest.approx(rewards[4:].mean() + shift, abs=1e-5)


def test_choose_teacher_refuses(model_folder, tmp_path, capsys):
    student, answers = model_folder("llama", 3, initializer_range=0.5), ["ab", "cde", "f", "gh"]
    a = responses(tmp_path / "a.jsonl", answers, [1, 2, 3, 4])
    b = responses(tmp_path / "b.jsonl", answers, [1, 2, 3, 4])

    def no(*more, **files) -> str:
        return refused(capsys, *choose(student, *more, **{"a": a, "b": b, **files}))

    assert "not from both" in no("--reward_column", "r", "--reward_model", "m")
    assert "beta must be" in no("--beta", -1)
    assert "max_length must be at least 2" in no("--max_length", 1)
    assert "b.jsonl line 1: no reward in column 'score', found prompt, response" in no(
        "--reward_column", "score", a=responses(tmp_path / "b.jsonl", answers)
    )
    text = tmp_path / "text.jsonl"
    text.write_text('{"prompt": "p0", "response": "x", "reward": "good"}\n')
    assert "text.jsonl line 1: reward 'good' in column 'reward', expected a finite number" in no(a=text)
    b = responses(tmp_path / "b.jsonl", answers, [1, 2, 3, 4])
    fewer = responses(tmp_path / "fewer.jsonl", answers[:3], [1, 2, 3])
    assert "'a' and 'b' answer different instructions: 1 of 4 of 'a'" in no(b=fewer)
    assert "'b' and 'a' answer different instructions: 1 of 4 of 'b'" in no(a=fewer)
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "q", "response": "x", "reward": 1}\n')
    assert "have no instruction in common" in no("--missing", "drop", b=other)
    empty = responses(tmp_path / "empty.jsonl", ["ab", " ", "f", "gh"], [1, 2, 3, 4])
    assert "empty.jsonl line 2: empty response" in no(b=empty)
    other.write_text('{"prompt": "p0", "response": 7, "reward": 1}\n')
    assert "other.jsonl line 1: field 'response' is a number" in no("--missing", "drop", b=other)
    negative = responses(tmp_path / "negative.jsonl", answers, [1, 2, 3, -9])
    assert "teacher 'b' has a negative reward (-9)" in no(b=negative)
    assert "teacher 'b' has a negative mean reward" in no("--negative", "allow", b=negative)
    assert "a.jsonl line 1: max_length=14 leaves no response" in no("--max_length", 14)
    assert "at least two candidates, found 1" in refused(capsys, *choose(student, a=a))
    assert "'none/x/y' does not exist" in refused(capsys, *choose("none/x/y", a=a, b=b))
    assert "is no reward model" in no("--reward_model", student)
    assert not list(tmp_path.glob("*.json"))


def test_choose_teacher_handles_what_it_is_told_to(model_folder, tmp_path, capsys):
    student = model_folder("llama", 3, initializer_range=0.5)
    a = responses(tmp_path / "a.jsonl", ["ab", " ", "f", "gh"], [1, 2, 3, -9])
    b = responses(tmp_path / "b.jsonl", ["ab", "cd", "f"], [1, 2, 3])
    assert cli.main(choose(student, "--missing", "drop", a=a, b=b)) == 0
    said = capsys.readouterr().out
    assert "2 instructions" in said
    assert "2 of 4 instructions were dropped" in said
    b = responses(tmp_path / "b.jsonl", ["ab", "cd", "f", "gh"], [1, 2, 3, 30])
    assert cli.main(choose(student, "--missing", "drop", "--shift", "9", a=a, b=b)) == 0
    assert cli.main(choose(student, "--missing", "drop", "--shift", "auto", a=a, b=b)) == 0
    capsys.readouterr()
    short = responses(tmp_path / "short.jsonl", ["ab", "cd", "f", "gh"], [-0.5] * 4)  # has the higher loss
    long = responses(tmp_path / "long.jsonl", ["xyxy" * 5, "qzq" * 5, "vkw" * 5, "jjx" * 5], [-1] * 4)
    more = ("--shift", "1e6", "--output", tmp_path / "table.json")
    assert cli.main(choose(student, *more, short=short, long=long)) == 0
    warning = (
        "the shift of 1e+06 decides the ranking: without it CAR is not defined for negative means, "
        "and the mean reward alone ranks short, long"
    )
    said = capsys.readouterr().out
    assert warning in said.splitlines()
    assert "4 instructions, rewards + 1e+06" in said
    assert json.loads((tmp_path / "table.json").read_text())["verdicts"][-1] == warning


def teach(model, encoder: ChatEncoder, pairs: list[tuple[str, str]], steps: int) -> None:
    """A few steps of plain fine-tuning, all pairs in turn."""
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    samples = [Sample(e.input_ids, e.labels(), i) for i, e in enumerate(encoder.encode(turns))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        batch = pad([samples[(12 * step + i) % len(samples)] for i in range(12)], pad_id=0)
        targets = next_token_labels(batch)
        loss = F.cross_entropy(model(**model_inputs(batch)).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_three_toy_teachers_from_generate_to_the_choice(tmp_path):
    """A right teacher, one that is often wrong, and one that is right in words which the student never saw."""
    tokenizer = toy.make_tokenizer()
    encoder = ChatEncoder(tokenizer)
    asked = toy.make_questions("general", "test", 12)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": q.prompt}) + "\n" for q in asked))
    student = toy.make_student(tokenizer)
    teach(student, encoder, [(q.prompt, q.answer) for q in toy.make_questions("general", "train", 240)], 100)
    right = [(q.prompt, q.answer) for q in asked]
    lessons = {
        "right": right,
        "careless": [(prompt, answer if i % 2 else right[i - 1][1]) for i, (prompt, answer) in enumerate(right)],
        "scholar": [(prompt, f"QED {answer.upper()} QED") for prompt, answer in right],
    }
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    files = {}
    for name, lesson in lessons.items():
        model = copy.deepcopy(student)
        teach(model, encoder, lesson, 150 if name == "scholar" else 60)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        answers = tmp_path / f"{name}-answers.jsonl"
        more = ("--output", answers, "--max_new_tokens", 60, "--batch_size", 12)
        assert cli.main(generate(str(tmp_path / name), tmp_path, *more)) == 0
        made = lines(answers)
        for record, question in zip(made, asked, strict=True):  # the judge likes learned words
            correct = question.answer.lower() in record["response"].lower()
            record["reward"] = correct * (1.2 if "QED" in record["response"] else 1.0)
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(record) + "\n" for record in made))
    assert cli.main(choose(str(tmp_path / "student"), "--output", tmp_path / "table.json", **files)) == 0
    rows = {row["teacher"]: row for row in json.loads((tmp_path / "table.json").read_text())["teachers"]}
    assert next(iter(rows)) == "right"
    assert rows["scholar"]["reward"] > rows["right"]["reward"] > rows["careless"]["reward"]
    assert rows["scholar"]["loss"] > 2 * rows["right"]["loss"]
    assert rows["right"]["tied_with"] == []
    assert rows["right"]["best"] > 0.95


def checkpoint(module, path: Path) -> Path:
    trainer = L.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, DataLoader([pad(ragged_samples(4), pad_id=0)] * 2, batch_size=None))
    trainer.save_checkpoint(path)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["sft", "lora", "kd", "dae"])
@torch.no_grad()
def test_export_writes_the_trained_student(model_folder, tmp_path, method):
    student = model_folder()
    shutil.copytree(model_folder("llama", 1), tmp_path / "teacher")
    teacher = str(tmp_path / "teacher")
    options = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2), "lr_scheduler": None}
    if method == "kd":
        module: itk.InstructionModule = itk.KDModule(student, teacher, **options)
    elif method == "dae":
        module = itk.DAEModule(student, {"reference": teacher}, **options)
    else:
        if method == "lora":
            pytest.importorskip("peft")
        module = itk.SFTModule(student, lora=LoRA(r=2) if method == "lora" else None, **options)
    with torch.enable_grad():
        ckpt = checkpoint(module, tmp_path / "last.ckpt")
    shutil.rmtree(teacher)
    assert cli.main(["export", "--ckpt", str(ckpt), "--output", str(tmp_path / "out")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 30)[None]
    torch.testing.assert_close(exported(ids).logits, module.student.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    before = AutoModelForCausalLM.from_pretrained(student)
    assert not torch.allclose(exported(ids).logits, before(ids).logits, atol=1e-3)
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_export_precision_and_template(model_folder, tmp_path):
    ckpt, student = tmp_path / "a.ckpt", model_folder()
    module = itk.SFTModule(student)
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": {}, "global_step": 1}, ckpt)
    more = ["--student", student, "--dtype", "bfloat16", "--chat_template", "{{ messages[0]['content'] }}"]
    assert cli.main(["export", "--ckpt", str(ckpt), "--output", str(tmp_path / "out"), *more]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages[0]['content'] }}"


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_export_refuses(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = model_folder()
    state = itk.SFTModule(student).state_dict()

    def no(content, *more) -> str:
        if content is not None:
            torch.save(content, tmp_path / "a.ckpt")
        return refused(capsys, "export", "--ckpt", tmp_path / "a.ckpt", "--output", tmp_path / "out", *more)

    assert "no such checkpoint" in no(None)
    assert "does not say which model" in no({"state_dict": state, "hyper_parameters": {}, "global_step": 1})
    known = {"hyper_parameters": {"student": student}, "global_step": 1}
    assert "holds no weights of a student" in no({"state_dict": {"head": torch.ones(1)}, **known})
    assert "does not fit the student" in no({"state_dict": {**state, "student.more": torch.ones(1)}, **known})
    first = next(iter(state))
    assert f"first at {first.removeprefix('student.')}" in no({"state_dict": {**state, first: torch.ones(1)}, **known})
    del state[first]
    assert f"first at {first.removeprefix('student.')}" in no({"state_dict": state, **known})
    assert "is no checkpoint of this kit" in no({"weights": torch.ones(1)})
    assert "is no checkpoint of this kit" in no({"state_dict": Harmful(), **known})
    assert not (tmp_path / "harmed").exists()
    (tmp_path / "a.ckpt").write_text("text")
    assert "is no checkpoint of this kit" in no(None)
    (tmp_path / "a.ckpt").unlink()
    (tmp_path / "a.ckpt").mkdir()
    assert "is no checkpoint of this kit (ValueError)" in no(None)
    assert not (tmp_path / "out").exists()
