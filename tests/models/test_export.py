"""`export` writes to the byte what a whole model in memory would save, from a few weights at a time."""

import json
import shutil
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from commands import refused
from safetensors.torch import load_file
from tiny import byte_tokenizer
from transformers import AutoModelForCausalLM

from lightning_itk import cli
from lightning_itk.models.export import open_student, write_folder
from lightning_itk.models.loading import LoRA, add_lora, load_causal_lm
from lightning_itk.models.saved import SavedModel
from lightning_itk.models.weights import ModelWeights, Weights


def checkpoint(path: Path, base: str, lora: LoRA | None = None, sharded: bool = False, **hparams) -> dict:
    """A checkpoint of a student that training moved, as a run would write it; the trained tensors."""
    model = load_causal_lm(base)
    model = add_lora(model, lora) if lora else model
    torch.manual_seed(7)
    trained = {
        name: parameter.detach() + 0.1 * torch.randn(parameter.shape, dtype=parameter.dtype)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight and not lora:
        ends = [
            n for n, p in model.named_parameters(remove_duplicate=False) if p is model.get_input_embeddings().weight
        ]
        trained |= dict.fromkeys(ends, trained[ends[0]])
    extra = {"hyper_parameters": {"student": base, "lora": vars(lora) if lora else None} | hparams, "global_step": 3}
    state = {f"student.{name}": tensor for name, tensor in trained.items()}
    if not sharded:
        torch.save({"state_dict": state} | extra, path)
        return trained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"state_dict": state}, checkpoint_id=path, no_dist=True)
    torch.save(extra, path / "meta.pt")
    return trained


def whole(base: str, trained: dict, lora: LoRA | None, dtype: str, folder: Path, size: str = "50GB") -> None:
    """The same export with everything in memory."""
    model = load_causal_lm(base)
    model = add_lora(model, lora) if lora else model
    model.load_state_dict(trained, strict=False)
    model = model.merge_and_unload() if lora else model
    state = {n: t if dtype == "auto" else t.to(getattr(torch, dtype)) for n, t in model.state_dict().items()}
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:  # .to() unties
        state = {n: state[n] for n in dict(model.named_parameters()) if n in state}
    model.save_pretrained(folder, state_dict=state, max_shard_size=size)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    found: dict[str, torch.Tensor] = {}
    for file in files:
        own = load_file(file)
        assert not own.keys() & found.keys()
        found |= own
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == found.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    return found


def assert_same(out: Path, expected: Path) -> None:
    mine, theirs = tensors(out), tensors(expected)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert mine[name].equal(tensor), name
    assert json.loads((out / "generation_config.json").read_text()) == json.loads(
        (expected / "generation_config.json").read_text()
    )
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, expected)]
    configs[1]["dtype"] = configs[0]["dtype"]  # the command's own
    assert configs[0] == configs[1]


def run(path: Path, out: Path, *more: str) -> None:
    assert cli.main(["export", "--ckpt", str(path), "--output", str(out), *more]) == 0


ADAPTERS = LoRA(r=2)
ARCHS = ["llama", "gpt2", "gpt_neox", "opt", "phi3", "mixtral", "qwen3_moe"]  # the last two have other files


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("arch", "lora", "tied"),
    [(arch, *how) for arch in ARCHS for how in ((None, True), (ADAPTERS, False))]
    + [(arch, *how) for arch in ("llama", "mixtral") for how in ((None, False), (ADAPTERS, True))],
)
def test_as_save_pretrained_writes_it(arch, tied, lora, model_folder, tmp_path, capsys):
    """Out of a file, and out of a folder where the embeddings are tied."""
    base = model_folder(arch, 0, tie_word_embeddings=tied)
    trained = checkpoint(tmp_path / "a.ckpt", base, lora, sharded=tied)
    assert (tmp_path / "a.ckpt").is_dir() == tied
    capsys.readouterr()
    run(tmp_path / "a.ckpt", tmp_path / "out", "--max_shard_size", "20KB")
    assert "as a whole" not in capsys.readouterr().out
    whole(base, trained, lora, "auto", tmp_path / "expected", "20KB")
    assert_same(tmp_path / "out", tmp_path / "expected")
    moved, before = tensors(tmp_path / "out"), tensors(Path(base))
    assert any(not tensor.equal(before[name]) for name, tensor in moved.items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("lora", "dtype", "hparams"),
    [
        (None, "bfloat16", {}),
        (ADAPTERS, "bfloat16", {}),
        (LoRA(r=2, target_modules=["q_proj", "embed_tokens"]), "auto", {}),
        (LoRA(r=2, modules_to_save=["lm_head"]), "auto", {}),
        (LoRA(r=2, modules_to_save=["lm_head", "embed_tokens"]), "float16", {}),
    ],
)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_precision_and_layers_trained_beside_adapters(lora, dtype, hparams, tied, model_folder, tmp_path):
    base = model_folder("llama", 0, tie_word_embeddings=tied)
    trained = checkpoint(tmp_path / "a.ckpt", base, lora, **hparams)
    run(tmp_path / "a.ckpt", tmp_path / "out", "--dtype", dtype)
    whole(base, trained, lora, dtype, tmp_path / "expected")
    assert_same(tmp_path / "out", tmp_path / "expected")


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_stream_is_said_and_exported_all_the_same(model_folder, tmp_path, capsys, monkeypatch):
    """A base without safetensors; a conversion that only works on the whole model."""
    base = tmp_path / "base"
    shutil.copytree(model_folder("llama"), base)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    trained = checkpoint(tmp_path / "a.ckpt", str(base), ADAPTERS)
    run(tmp_path / "a.ckpt", tmp_path / "out")
    assert "the base model is read as a whole: " in capsys.readouterr().out
    whole(str(base), trained, ADAPTERS, "auto", tmp_path / "expected")
    assert_same(tmp_path / "out", tmp_path / "expected")

    monkeypatch.setattr(SavedModel, "_split", lambda *_: False)
    for number, lora in enumerate((None, ADAPTERS)):
        trained = checkpoint(tmp_path / f"{number}.ckpt", model_folder("mixtral"), lora)
        run(tmp_path / f"{number}.ckpt", tmp_path / f"out-{number}", "--max_shard_size", "20KB")
        assert "as a whole" in capsys.readouterr().out
        whole(model_folder("mixtral"), trained, lora, "auto", tmp_path / f"expected-{number}")
        assert_same(tmp_path / f"out-{number}", tmp_path / f"expected-{number}")


class Watched(Weights):
    """Notes how many bytes of what it read are in use at once."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.read_so_far, self.most = weights, [], 0

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def _note(self, tensors):
        self.read_so_far += [weakref.ref(tensor) for tensor in tensors]
        self.most = max(self.most, sum(t.nbytes for ref in self.read_so_far if (t := ref()) is not None))

    def read(self, names):
        found = self.weights.read(names)
        self._note(found.values())
        return found

    def stored(self, name):
        found = self.weights.stored(name)
        self._note([] if found is None else [found])
        return found


@pytest.mark.parametrize("lora", [None, ADAPTERS], ids=["full", "lora"])
def test_one_file_is_in_memory_at_a_time(lora, model_folder, tmp_path):
    checkpoint(tmp_path / "a.ckpt", model_folder("llama"), lora, sharded=True)
    student = open_student(tmp_path / "a.ckpt")
    watched = Watched(student.weights)
    write_folder(student.saved, watched, byte_tokenizer(), tmp_path / "out", max_shard_size="50KB")
    largest = max(tensor.nbytes for tensor in student.saved.tensors.values())
    assert 40_000 < watched.most <= 50_000 + largest
    assert sum(tensor.nbytes for tensor in student.saved.tensors.values()) > 100_000
    plain = ModelWeights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert all(tensor.equal(plain.read([name])[name]) for name, tensor in tensors(tmp_path / "out").items())


def test_refusals(model_folder, tmp_path, capsys):
    base, ckpt, out = model_folder("llama"), tmp_path / "a.ckpt", tmp_path / "out"
    checkpoint(ckpt, base, sharded=True)
    command = ("export", "--ckpt", ckpt, "--output", out)
    line = refused(capsys, *command, "--max_shard_size", "much")
    assert "max_shard_size: expected a size such as 5GB, found 'much'" in line
    student = open_student(ckpt)
    shutil.rmtree(ckpt)
    checkpoint(ckpt, base, sharded=True)
    with pytest.raises(ValueError, match="another checkpoint took its place while it was read"):
        write_folder(student.saved, student.weights, byte_tokenizer(), out)
    (shard,) = ckpt.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert "cannot be read" in refused(capsys, *command)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
