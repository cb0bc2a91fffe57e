import lightning as L
import pytest
import torch
from tiny import byte_tokenizer, ragged_samples, tiny_model

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
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
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
