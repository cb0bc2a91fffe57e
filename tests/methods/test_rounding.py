"""Half-precision weights that do not move, and the line that says so."""

import warnings

import lightning as L
import pytest
import torch
from tiny import QUIET, ragged_samples, tiny_model

import lightning_itk as itk
from lightning_itk import batch as b
from lightning_itk.methods.rounding import stuck_share


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", [1e-6, 2e-5, 1e-3, 0.1])
def test_the_share_is_what_an_adam_step_leaves(dtype, rate):
    weight = torch.nn.Parameter((torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype))
    optimizer = torch.optim.Adam([weight], lr=rate, eps=0)
    before = weight.detach().clone()
    share = stuck_share(optimizer.param_groups)
    weight.grad = torch.where(weight > 0, 1.0, -1.0).to(dtype)
    optimizer.step()
    assert share == pytest.approx(float((weight == before).float().mean()), abs=0.01)


def test_fp32_weights_move():
    assert stuck_share([{"params": [torch.ones(3)], "lr": 1e-9}]) == 0


@pytest.mark.parametrize(
    ("dtype", "rate", "warned"), [("bfloat16", 2e-5, True), ("bfloat16", 0.1, False), ("float32", 2e-5, False)]
)
def test_a_run_says_so(dtype, rate, warned):
    student = tiny_model("llama").to(getattr(torch, dtype))
    module = itk.SFTModule(
        student, optimizer=lambda p: torch.optim.AdamW(p, lr=rate), lr_scheduler="linear", warmup=0.5
    )
    loader = torch.utils.data.DataLoader([b.pad(ragged_samples(4), pad_id=0)], batch_size=None)
    trainer = L.Trainer(**QUIET, max_steps=1, enable_checkpointing=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader)
    found = [str(w.message) for w in caught if "rounded away" in str(w.message)]
    assert len(found) == warned
    assert all("trainer.precision: bf16-mixed" in line for line in found)
