"""Models in GGUF files: found in every way to name one, whole, and like any other model afterwards."""

import pytest
import torch
from tiny import tiny_model
from tiny_gguf import write_gguf
from transformers import AutoModelForCausalLM

from lightning_itk import KDModule, SFTModule, gguf
from lightning_itk.hub import load_config, load_tokenizer
from lightning_itk.methods.teacher import Teacher
from lightning_itk.models.export import export, open_student, write_folder
from lightning_itk.models.loading import load_causal_lm


@pytest.fixture
def folder(tmp_path):
    """A folder with a tiny llama in `model.gguf`."""
    pytest.importorskip("gguf")
    write_gguf(tiny_model("llama"), tmp_path / "model.gguf")
    return tmp_path


NAMES = {
    "path": lambda folder: (str(folder / "model.gguf"), None),
    "folder": lambda folder: (str(folder), None),
    "kwargs": lambda folder: (str(folder), {"gguf_file": "model.gguf"}),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_name_one(folder, name):
    place, kwargs = NAMES[name](folder)
    model = load_causal_lm(place, model_kwargs=kwargs)
    for (key, weight), found in zip(tiny_model("llama").named_parameters(), model.parameters(), strict=True):
        assert found.equal(weight), key
    assert load_config(place, model_kwargs=kwargs).num_hidden_layers == 2
    tokenizer = load_tokenizer(place, model_kwargs=kwargs)
    assert tokenizer("ab<|im_end|>")["input_ids"] == [259, 2]
    assert "<|im_start|>" in tokenizer.chat_template


@pytest.mark.parametrize("name", NAMES)
def test_student_and_teacher_share_the_files_tokenizer(folder, name):
    place, kwargs = NAMES[name](folder)
    module = KDModule(place, place, student_kwargs=kwargs, teacher_kwargs=kwargs, teacher_dtype="bfloat16")
    assert module.tokenizer.chat_template == module.teacher.load_tokenizer().chat_template
    assert (module.student.dtype, module.teacher.model.dtype) == (torch.float32, torch.bfloat16)
    assert all(parameter.requires_grad for parameter in module.student.parameters())


def test_an_export_is_a_plain_folder(folder, tmp_path):
    out = tmp_path / "out"
    model = load_causal_lm(str(folder / "model.gguf"))
    export(model, load_tokenizer(str(folder)), out)
    again = AutoModelForCausalLM.from_pretrained(out)
    assert "quantization_config" not in (out / "config.json").read_text()
    assert not list(out.glob("*.gguf"))
    assert all(a.equal(b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert load_tokenizer(str(out))("ab")["input_ids"] == [259]


def test_a_checkpoint_says_which_file_was_read_and_nothing_else(folder, tmp_path):
    """A checkpoint may come from anybody: `weights_only` and the like are not its to choose."""
    write_gguf(tiny_model("llama", 1), folder / "other.gguf")
    module = SFTModule(str(folder), student_kwargs={"gguf_file": "other.gguf"})
    hparams = {**module.hparams, "student_kwargs": {"gguf_file": "other.gguf", "weights_only": False, "nonsense": 1}}
    state = {f"student.{name}": weight for name, weight in module.student.state_dict().items()}
    torch.save({"hyper_parameters": hparams, "state_dict": state, "global_step": 3}, tmp_path / "last.ckpt")
    trained = open_student(tmp_path / "last.ckpt")
    assert trained.kwargs == {"gguf_file": "other.gguf"}
    write_folder(trained.saved, trained.weights, module.tokenizer, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(a.equal(b) for a, b in zip(exported.parameters(), module.student.parameters(), strict=True))
    assert open_student(tmp_path / "last.ckpt", str(folder / "other.gguf")).kwargs == {}


def test_what_cannot_be_meant(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    cases = {
        (str(tmp_path), None): r"holds 2 GGUF files \(a.gguf, b.gguf\): name one by its path",
        (str(tmp_path), "c.gguf"): "holds no 'c.gguf'",
        (str(tmp_path / "a.gguf"), "b.gguf"): "is a file",
    }
    for (name, file), message in cases.items():
        with pytest.raises(ValueError, match=message):
            gguf.located(name, file)
    for name in ("nowhere.gguf", str(tmp_path / "nowhere.gguf")):
        with pytest.raises(ValueError, match="file '.*nowhere.gguf' does not exist"):
            load_tokenizer(name)
    part = tmp_path / "big-00001-of-00003.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="one of several parts"):
        load_causal_lm(str(part))
    (tmp_path / "config.json").write_text("{}")  # a plain model's folder may hold such files as well
    assert gguf.located(str(tmp_path)) == {"pretrained_model_name_or_path": str(tmp_path)}
    assert gguf.located("org/model.gguf") == {"pretrained_model_name_or_path": "org/model.gguf"}  # a hub name
    with pytest.raises(ValueError, match="the Trainer places the student"):
        SFTModule("gpt2", student_kwargs={"device_map": "auto"})


def test_a_damaged_file_is_one_line(folder):
    whole = (folder / "model.gguf").read_bytes()
    for size in (3, 20, 200, len(whole) // 4, len(whole) - 40):
        (folder / "model.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="model.gguf' (cannot be loaded: |has .* missing)"):
            Teacher(str(folder / "model.gguf"))


def test_without_the_package_a_line_says_what_to_install(tmp_path, monkeypatch):
    from transformers import modeling_gguf_pytorch_utils

    monkeypatch.setattr(modeling_gguf_pytorch_utils, "is_gguf_available", lambda *_: False)
    header = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    text = b"".join(len(t).to_bytes(8, "little") + t + kind for t, kind in ((b"general.architecture", b"\x08\0\0\0"),))
    (tmp_path / "m.gguf").write_bytes(header + text + (5).to_bytes(8, "little") + b"llama")
    for load in (load_causal_lm, load_tokenizer, load_config):
        with pytest.raises(ValueError, match=r"need the `gguf` extra: pip install 'lightning-itk\[gguf\]'"):
            load(str(tmp_path))
