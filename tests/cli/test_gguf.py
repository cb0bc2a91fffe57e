"""The commands on models in GGUF files, where others take folders."""

import json
from pathlib import Path

import pytest
from commands import choose, generate, lines, responses
from tiny import tiny_model
from tiny_gguf import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_itk import cli
from lightning_itk.cached.manifest import Manifest

DEEP = {"num_hidden_layers": 4}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Student and teacher as files; the working folder is the test's."""
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    Path("teacher").mkdir()
    write_gguf(tiny_model("llama", 1, **DEEP), Path("teacher/model.gguf"))
    return write_gguf(tiny_model("llama", 0), Path("student.gguf")), "teacher"


def fit(method: str, **model) -> list[str]:
    records = [{"prompt": f"q{i}", "completion": "ab" * (1 + i % 7), "is_domain": i % 2} for i in range(16)]
    Path("data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    trainer = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "enable_progress_bar": False, "logger": False}
    saving = {"dirpath": "saved", "save_last": True}
    trainer["callbacks"] = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving},
        {"class_path": "lightning_itk.callbacks.HFExport", "init_args": {"dirpath": "export"}},
    ]
    data = {"train": "data.jsonl", "validation": 0.2, "max_length": 48, "batch_size": 4, "num_proc": 1,
            "cache_dir": "cache"}  # fmt: skip
    whole = {"trainer": trainer, "data": data, "model": {"class_path": f"lightning_itk.{method}", "init_args": model}}
    Path("run.yaml").write_text(json.dumps(whole))
    return ["fit", "--config", "run.yaml"]


METHODS = {
    "SFTModule": lambda student, _: {"student": ".", "student_kwargs": {"gguf_file": student}},
    "KDModule": lambda student, teacher: {"student": student, "teacher": teacher, "attention": {"weight": 1.0}},
    "DAEModule": lambda student, teacher: {"student": student, "teachers": {"reference": student, "expert": teacher}},
}


@pytest.mark.parametrize("method", METHODS)
def test_train_and_export(models, method):
    assert cli.main(fit(method, **METHODS[method](*models))) == 0
    assert cli.main(["export", "--ckpt", "saved/last.ckpt", "--output", "again"]) == 0
    trained, again = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("export/last", "again"))
    assert all(a.equal(b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))
    assert not trained.lm_head.weight.equal(tiny_model("llama").lm_head.weight)
    assert AutoTokenizer.from_pretrained("export/last")("ab")["input_ids"] == [259]


def test_a_teacher_is_cached(models, capsys):
    student, teacher = models
    command = fit("KDModule", student=student, teacher=teacher, attention={"weight": 1.0})
    assert cli.main(["tokenize", *command[1:]]) == 0
    assert cli.main(["cache-teacher", *command[1:], "--output", "cached", "--attention", "true"]) == 0
    assert Manifest.read("cached").settings["layers"] == [1, 3]
    assert cli.main([*command, "--model.init_args.teacher", "cached"]) == 0


def test_generate_choose_and_prune(models, prompts):
    student, teacher = models
    assert cli.main(generate(student, prompts)) == 0
    assert len(lines("out.jsonl")) == 5
    first, second = (responses(Path(f"{n}.jsonl"), [n * 3] * 5, [1.0 * i] * 5) for i, n in enumerate("ab", 1))
    assert cli.main(choose(student, "--output", "table.json", a=first, b=second)) == 0
    assert cli.main(["prune", "--model", teacher, "--layers", "0,3", "--output", "small", "--device", "cpu"]) == 0
    small, whole = AutoModelForCausalLM.from_pretrained("small"), tiny_model("llama", 1, **DEEP)
    assert small.model.layers[1].mlp.up_proj.weight.equal(whole.model.layers[3].mlp.up_proj.weight)
