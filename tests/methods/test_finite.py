"""No number that is not finite reaches the weights, whether it comes with the loss or with the gradient alone."""

import lightning as L
import pytest
import torch
from exact import batches
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import QUIET, tiny_model

import lightning_itk as itk
from lightning_itk.methods.finite import FiniteGuard

BAD = {
    "loss nan": lambda total: total * torch.nan,
    "loss inf": lambda total: total + torch.inf,
    # finite, with an infinite gradient
    "gradient inf": lambda total: total + ((total - total.detach()) * 0).abs().sqrt(),
}


class Sometimes(itk.SFTModule):
    """Something goes wrong in one micro-batch."""

    bad = ("loss nan", -1)

    def training_step(self, batch, batch_idx):
        self.now = batch_idx
        return super().training_step(batch, batch_idx)

    def losses(self, batch):
        (term,) = super().losses(batch).values()
        kind, at = self.bad
        return {"ce": itk.Term(BAD[kind](term.total) if self.now == at else term.total)}


def fit(folder, kind, data, *, at=5, accumulate=2, optimizer=torch.optim.SGD, **options):
    model = Sometimes(tiny_model(), optimizer=lambda p: optimizer(p, lr=0.1), lr_scheduler=None, **options)
    model.bad = (kind, at)
    trainer = L.Trainer(
        **QUIET,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
    )
    error = None
    try:
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=None))
    except ValueError as stopped:
        error = str(stopped)
    return model, trainer, error


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.student.parameters()])


@pytest.mark.parametrize("kind", BAD)
def test_the_run_stops_before_the_weights_are_touched(kind, tmp_path):
    data = batches(4)  # 7 micro-batches; the sixth, of samples 20..23, is in the third step
    model, trainer, error = fit(tmp_path, kind, data)
    term = "the gradient is" if kind == "gradient inf" else f"train/ce is {kind.split()[1]}"
    assert error.startswith("step 2: ")
    assert term in error
    assert f"Go back to {tmp_path}/step=2.ckpt, or set nonfinite: skip" in error
    assert "samples 20, 21, 22, 23." in error if kind != "gradient inf" else "samples 16, 17, 18, 19, 20" in error
    assert "\n" not in error
    expected = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    assert all(weight.equal(expected[f"student.{name}"]) for name, weight in model.student.state_dict().items())


@pytest.mark.parametrize("kind", BAD)
def test_skipped_steps_are_counted_and_as_if_they_had_not_been(kind, tmp_path):
    data = batches(4)
    adam = torch.optim.AdamW  # its moments and its decay, too, must not move
    model, trainer, error = fit(tmp_path / "a", kind, data, nonfinite="skip", optimizer=adam)
    assert error is None
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    assert trainer.global_step == 4
    without, _, _ = fit(tmp_path / "b", kind, data[:4] + data[6:], at=-1, nonfinite="skip", optimizer=adam)
    assert weights(model).equal(weights(without))
    checkpoint = torch.load(tmp_path / "a" / "step=4.ckpt", weights_only=True)
    assert checkpoint["skipped_steps"] == 1


def test_without_a_wait_the_gradients_become_zero_and_the_next_look_stops(monkeypatch):
    """The path of a GPU, on a device that merely claims not to be the CPU."""

    class Trainer:
        global_step, precision_plugin, checkpoint_callbacks = 3, None, ()

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda g: torch.tensor(torch.inf).as_subclass(Elsewhere))
    guard, parameter = FiniteGuard("stop"), torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, torch.nan])
    guard.add({"sample_ids": torch.tensor([[4, 4, -1]])}, torch.tensor(1.0))
    guard.norm(Trainer(), [parameter], {"train/ce": torch.tensor(1.0)})
    assert not parameter.grad.any()
    with pytest.raises(ValueError, match="step 3: the gradient is inf; samples 4. .*the beginning"):
        guard.check(Trainer())
    guard.check(Trainer())  # said once


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="nonfinite must be 'stop' or 'skip', got 'ignore'"):
        itk.SFTModule(tiny_model(), nonfinite="ignore")
