import lightning as L
import pytest
import torch
from tiny import QUIET, byte_tokenizer, ragged_samples, tiny_model

import lightning_itk as itk
from lightning_itk import batch as b
from lightning_itk.callbacks import HFExport, RunCard, run_facts
from lightning_itk.methods.distillation import AttentionLoss
from lightning_itk.models.export import export
from lightning_itk.models.loading import LoRA


def loader():
    samples = ragged_samples(8)
    return torch.utils.data.DataLoader([b.pad(samples, pad_id=0)] * 2, batch_size=None)


def fit(model, tmp_path, *callbacks, **kwargs):
    trainer = L.Trainer(
        **QUIET,
        max_epochs=2,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        **kwargs,
    )
    trainer.fit(model, loader(), loader())
    return trainer


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**b.model_inputs(batch)).logits


@pytest.mark.parametrize("lora", [None, LoRA(r=4)])
def test_best_and_last_are_plain_transformers_folders(tmp_path, model_folder, lora):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = itk.SFTModule(model_folder("llama"), lora=lora, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    fit(model, tmp_path, HFExport(str(tmp_path / "out")))
    (batch,) = list(loader())[:1]
    for name in ("best", "last"):
        folder = tmp_path / "out" / name
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert (folder / "model.safetensors").exists()
        torch.testing.assert_close(logits(plain, batch), logits(model.student, batch), rtol=1e-4, atol=1e-5)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert "<|im_start|>" in tokenizer.chat_template
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["best", "last"]


def test_best_follows_the_metric(tmp_path):
    model = itk.SFTModule(
        tiny_model(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5, maximize=True), lr_scheduler=None
    )
    model.tokenizer = byte_tokenizer()
    callback = HFExport(str(tmp_path / "out"))
    fit(model, tmp_path, callback)
    from transformers import AutoModelForCausalLM

    worse = fit(model, tmp_path).callback_metrics["val/loss"].item()
    assert callback.best < worse
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "best")
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "last")
    assert not best.lm_head.weight.equal(last.lm_head.weight)
    with pytest.raises(ValueError, match="mode must be"):
        HFExport(mode="least")
    with pytest.raises(ValueError, match="max_shard_size: expected a size such as 5GB, found 'all'"):
        HFExport(max_shard_size="all")


def test_a_full_disk_leaves_the_old_export_and_one_line(tmp_path, monkeypatch):
    model = tiny_model()
    export(model, byte_tokenizer(), tmp_path / "out")
    before = sorted(p.name for p in (tmp_path / "out").iterdir())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(ValueError, match="out: cannot be written: No space left on device"):
        export(model, byte_tokenizer(), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_export_in_another_dtype(tmp_path):
    from transformers import AutoModelForCausalLM

    export(tiny_model(), byte_tokenizer(), tmp_path / "out", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_the_run_card_says_what_runs(tmp_path, capsys):
    module = itk.KDModule(tiny_model(), tiny_model("llama", 1), attention=AttentionLoss())
    trainer = fit(module, tmp_path, RunCard(), accumulate_grad_batches=2)
    facts = run_facts(trainer, module)
    assert facts["losses"] == "torch (impl=auto) on cpu"
    assert "trained" in facts["student"]
    assert "attention sdpa" in facts["student"]
    assert "frozen" in facts["teacher 1"]
    assert "2 micro-batches" in facts["optimizer step"]
    assert "KDModule" in capsys.readouterr().out


def test_the_run_card_asks_about_the_models_that_run(tmp_path, monkeypatch):
    asked = []

    def describe(impl, tensor, kind, head_dim):
        asked.append((impl, tensor.dtype, kind, head_dim))
        return ""

    monkeypatch.setattr("lightning_itk.callbacks.describe_impl", describe)
    wide, attention = tiny_model("qwen3", 1, head_dim=24), AttentionLoss()
    for module in (
        itk.SFTModule(tiny_model().bfloat16()),
        itk.KDModule(tiny_model(), tiny_model("llama", 1), kind="jsd"),
        itk.KDModule(tiny_model(), wide, attention=attention),
    ):
        fit(module, tmp_path, RunCard(), limit_train_batches=1, limit_val_batches=0)
    assert asked == [
        ("auto", torch.bfloat16, None, None),
        ("auto", torch.float32, "jsd", None),
        ("auto", torch.float32, "forward", 24),
    ]


def test_a_monitor_that_never_appears_is_said_at_the_first_validation(tmp_path):
    with pytest.raises(ValueError, match=r"no metric 'val_loss' to monitor; there are val/ce, val/loss"):
        fit(itk.SFTModule(tiny_model()), tmp_path, HFExport(monitor="val_loss"))


def test_only_earlier_exports_are_replaced(tmp_path):
    model, tokenizer, folder = tiny_model(), byte_tokenizer(), tmp_path / "out"
    export(model, tokenizer, folder)
    export(model, tokenizer, folder)
    link = tmp_path / "link"
    link.symlink_to(folder)
    export(model, tokenizer, link)
    assert link.is_symlink()
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"out: holds notes.txt, which no export wrote"):
        export(model, tokenizer, link)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    base = tmp_path / "base"
    model.save_pretrained(base)  # a model that somebody else put there
    with pytest.raises(ValueError, match=r"base: holds config.json, which no export wrote"):
        export(model, tokenizer, base)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file: is a file"):
        export(model, tokenizer, tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "file", "link", "out"]


def test_a_foreign_export_folder_is_said_before_training(tmp_path):
    (tmp_path / "mine" / "last").mkdir(parents=True)
    (tmp_path / "mine" / "last" / "thesis.tex").write_text("years")
    model = itk.SFTModule(tiny_model())
    with pytest.raises(ValueError, match="holds thesis.tex, which no export wrote"):
        fit(model, tmp_path, HFExport(str(tmp_path / "mine")))
    assert model.trainer.global_step == 0


def test_files_that_come_while_it_trains_are_kept_and_the_student_too(tmp_path):
    class Note(L.Callback):
        def on_train_end(self, trainer, pl_module):
            (tmp_path / "export" / "last").mkdir(parents=True)
            (tmp_path / "export" / "last" / "notes.txt").write_text("mine")

    model = itk.SFTModule(tiny_model())
    model.tokenizer = byte_tokenizer()
    with pytest.warns(UserWarning, match="holds notes.txt, which no export wrote.*exported to .*last-step-4"):
        fit(model, tmp_path, Note(), HFExport())
    assert [path.name for path in (tmp_path / "export" / "last").iterdir()] == ["notes.txt"]
    assert (tmp_path / "export" / "last-step-4" / "model.safetensors").exists()
