import lightning as L
import pytest
import torch
from tiny import ragged_samples, tiny_model

import lightning_itk as itk
from lightning_itk import batch as b
from lightning_itk.losses import chunked
from lightning_itk.losses.chunked import project
from lightning_itk.models.loading import LoRA


def loader(size=4, count=16):
    samples = ragged_samples(count)
    data = [b.pad(samples[i : i + size], pad_id=0) for i in range(0, count, size)]
    return torch.utils.data.DataLoader(data, batch_size=None)


def trainer(tmp_path, **kwargs):
    options = {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(default_root_dir=tmp_path, **{**options, **kwargs})


def test_everything_is_logged(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    fit = trainer(tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=1, accumulate_grad_batches=2)
    fit.fit(itk.SFTModule(tiny_model()), loader(), loader())
    columns = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    wanted = {"train/loss", "train/ce", "train/lr", "train/grad_norm", "train/padding", "tokens/s"}
    wanted |= {"val/loss", "val/perplexity", "val/token_accuracy", "val/response_loss"}
    assert wanted <= set(columns)


def test_the_logged_loss_is_the_token_mean_of_the_step(tmp_path):
    model = itk.SFTModule(tiny_model(), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    fit = trainer(tmp_path, logger=False, enable_checkpointing=False, accumulate_grad_batches=4)
    fit.fit(model, loader())
    with torch.no_grad():
        total = sum(model.losses(batch)["ce"].total for batch in loader())
    count = sum(b.count_targets(batch) for batch in loader())
    assert fit.callback_metrics["train/loss"].item() == pytest.approx((total / count).item(), rel=1e-5)
    assert fit.global_step == 1


def test_the_gradient_that_clipping_sees_is_the_token_means(tmp_path):
    seen = []

    class Look(itk.SFTModule):
        def configure_gradient_clipping(self, optimizer, *args, **kwargs):
            seen.append(torch.cat([p.grad.flatten() for p in self.student.parameters()]))

    model = Look(tiny_model(), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer(tmp_path, logger=False, enable_checkpointing=False).fit(model, loader(size=16))
    (batch,) = loader(size=16)
    mean = model.losses(batch)["ce"].total / b.count_targets(batch)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(mean, list(model.student.parameters()))])
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-7)


def test_checkpoints_are_safe_small_and_load(tmp_path, model_folder):
    folder = model_folder("llama", 0)
    model = itk.KDModule(folder, model_folder("llama", 1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    fit = trainer(tmp_path, logger=False)
    fit.fit(model, loader())
    path = fit.checkpoint_callback.best_model_path
    checkpoint = torch.load(path, weights_only=True)
    assert all(name.startswith("student.") for name in checkpoint["state_dict"])
    assert checkpoint["hyper_parameters"]["student"] == folder
    assert "optimizer" not in checkpoint["hyper_parameters"]
    again = itk.KDModule.load_from_checkpoint(path, weights_only=True)
    for name, weight in model.state_dict().items():
        assert weight.equal(again.state_dict()[name])


@pytest.mark.parametrize("method", ["kd", "dae"])
def test_a_tied_teacher_stays_out_of_checkpoints_and_old_ones_load(tmp_path, model_folder, method):
    student, teacher = model_folder("llama", 0), model_folder("llama", 1, tie_word_embeddings=True)
    kind, arguments = {
        "kd": (itk.KDModule, {"teacher": teacher}),
        "dae": (itk.DAEModule, {"teachers": {"reference": teacher}}),
    }[method]
    fit = trainer(tmp_path, logger=False)
    fit.fit(kind(student, **arguments), loader())
    path = fit.checkpoint_callback.best_model_path
    checkpoint = torch.load(path, weights_only=True)
    assert all(name.startswith("student.") for name in checkpoint["state_dict"])
    slipped_in = {"kd": "teacher.model.lm_head.weight", "dae": "_teachers.0.model.lm_head.weight"}[method]
    checkpoint["state_dict"][slipped_in] = checkpoint["state_dict"]["student.lm_head.weight"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    again = kind.load_from_checkpoint(tmp_path / "old.ckpt", weights_only=True)
    assert again.student.lm_head.weight.equal(checkpoint["state_dict"]["student.lm_head.weight"])


def test_lora_trains_and_saves_adapters_only(tmp_path, model_folder):
    pytest.importorskip("peft")
    model = itk.SFTModule(
        model_folder("llama", 0),
        lora=LoRA(r=4, dropout=0.1),
        gradient_checkpointing=True,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
    )
    frozen = {n: p.clone() for n, p in model.student.named_parameters() if not p.requires_grad}
    fit = trainer(tmp_path, logger=False)
    fit.fit(model, loader())
    path = fit.checkpoint_callback.best_model_path
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state
    assert all("lora_" in name for name in state)
    assert all(p.equal(frozen[n]) for n, p in model.student.named_parameters() if n in frozen)
    again = itk.SFTModule.load_from_checkpoint(path, weights_only=True)
    batch = next(iter(loader()))
    model.eval()
    again.eval()
    assert again.losses(batch)["ce"].total.item() == pytest.approx(model.losses(batch)["ce"].total.item())


def test_schedules_step_once_per_optimizer_step(tmp_path):
    model = itk.SFTModule(
        tiny_model(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0), lr_scheduler="linear", warmup=0.5
    )
    rates = []

    class Rates(L.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    trainer(tmp_path, logger=False, enable_checkpointing=False, max_epochs=2, callbacks=[Rates()]).fit(model, loader())
    assert rates == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("plain", [True, False])
def test_plateaus_are_seen_in_the_validation_loss(tmp_path, plain):
    from lightning.pytorch.cli import ReduceLROnPlateau

    builder = torch.optim.lr_scheduler.ReduceLROnPlateau if plain else ReduceLROnPlateau
    options = {"patience": 0, "threshold": 1e9, **({} if plain else {"monitor": "val/response_loss"})}
    model = itk.SFTModule(
        tiny_model(),
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        lr_scheduler=lambda optimizer: builder(optimizer, **options),
    )
    fit = trainer(tmp_path, logger=False, enable_checkpointing=False, max_epochs=3)
    fit.fit(model, loader(), loader())
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3)  # nothing is ever better by so much


def test_compiled_decoder_gives_the_same_loss(tmp_path, monkeypatch):
    batch = next(iter(loader()))
    plain = itk.SFTModule(tiny_model()).losses(batch)["ce"].total
    from torch import nn

    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_(self, backend="eager"))
    assert itk.SFTModule(tiny_model(), compile=True).losses(batch)["ce"].total.item() == pytest.approx(plain.item())


@pytest.mark.parametrize("method", ["sft", "kd", "dae"])
def test_max_scratch_bytes_reaches_every_loss(method, monkeypatch):
    """A few rows of logits at a time instead of all: the same losses and figures."""
    rows = []
    monkeypatch.setattr(chunked, "project", lambda hidden, head: rows.append(len(hidden)) or project(hidden, head))
    batch = b.pad(ragged_samples(6), pad_id=0)
    results = []
    for bound in (None, 40_000):
        make = {
            "sft": lambda **how: itk.SFTModule(tiny_model(), **how),
            "kd": lambda **how: itk.KDModule(tiny_model(), tiny_model(seed=1), ce_weight=0.5, **how),
            "dae": lambda **how: itk.DAEModule(tiny_model(), {"one": tiny_model(seed=1)}, **how),
        }
        module = make[method](max_scratch_bytes=bound)
        rows.clear()
        terms = module.losses(batch) | module.evaluate(batch)
        results.append({name: term.total for name, term in terms.items()})
        logits = module.student.config.vocab_size * 4
        assert max(rows) == b.response_rows(batch).targets.numel() if bound is None else max(rows) * logits <= bound
    torch.testing.assert_close(results[0], results[1])


def test_refusals(tmp_path, model_folder):
    with pytest.raises(ValueError, match="max_scratch_bytes must be positive"):
        itk.SFTModule(tiny_model(), max_scratch_bytes=0)
    with pytest.raises(ValueError, match="warmup must not be negative"):
        itk.SFTModule(tiny_model(), warmup=-1)
    with pytest.raises(ValueError, match="folder '/nowhere/at/all' does not exist"):
        itk.SFTModule("/nowhere/at/all")
    with pytest.raises(NotImplementedError, match="Empty must implement losses"):
        type("Empty", (itk.InstructionModule,), {})(tiny_model()).losses({})


def test_tensor_parallelism_is_refused():
    class Two:
        def size(self):
            return 2

    model = itk.SFTModule(tiny_model())
    model._device_mesh = {"data_parallel": Two(), "tensor_parallel": Two()}
    with pytest.raises(ValueError, match="tensor_parallel_size is 2, .*set tensor_parallel_size: 1"):
        model.configure_model()


def test_token_ids_beyond_the_embedding_are_refused(tmp_path):
    class Data(L.LightningDataModule):
        max_token_id = 300

        def train_dataloader(self):
            return loader()

    with pytest.raises(ValueError, match="token id 300 but .* has only 300 embeddings"):
        trainer(tmp_path, logger=False).fit(itk.SFTModule(tiny_model()), datamodule=Data())
