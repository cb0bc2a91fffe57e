"""The gradient of an optimizer step depends only on which samples are in it. SFT, KD + attention, DAE; all in fp32."""

import functools

import lightning as L
import numpy as np
import pytest
import torch
from exact import METHODS, SAMPLES, TAGS, batches, module
from tiny import QUIET, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_itk import batch as b
from lightning_itk.methods.sft import SFTModule
from lightning_itk.models import precision
from lightning_itk.recorder import response_losses


def fit(model, data, accumulate=1, **kwargs) -> torch.Tensor:
    trainer = L.Trainer(
        **QUIET,
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        enable_checkpointing=False,
        **kwargs,
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=None))
    assert trainer.global_step == 8
    return torch.cat([parameter.detach().flatten() for parameter in model.student.parameters()])


@functools.cache
def reference(method: str) -> torch.Tensor:
    return fit(module(method), batches(8))


def agrees(weights: torch.Tensor, method: str) -> bool:
    start = torch.cat([p.detach().flatten() for p in tiny_model("llama", 0).parameters()])
    moved = (reference(method) - start).norm()
    assert moved > 1e-2
    return bool((weights - reference(method)).norm() / moved < 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches(method):
    assert agrees(fit(module(method), batches(2), accumulate=4), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["packed", "wide"])
def test_layout(method, layout):
    assert agrees(fit(module(method), batches(8, layout)), method)


def test_gradients_that_are_fp16_themselves():
    """One response token a sample: its gradient is small, and no GradScaler lifts it into fp16's range."""
    last = [
        s._replace(labels=np.where(np.arange(len(s.labels)) < len(s.labels) - 1, -100, s.input_ids)) for s in SAMPLES
    ]
    data = [b.pad(last[i : i + 2], pad_id=0, teachers=TAGS) for i in range(0, 8, 2)]

    def gradient(dtype: torch.dtype, **options) -> torch.Tensor:
        found = []

        class Module(SFTModule):
            def on_before_optimizer_step(self, optimizer):
                super().on_before_optimizer_step(optimizer)
                found.append(torch.cat([p.grad.double().flatten() for p in self.student.parameters()]))

        model = Module(tiny_model("llama", 0).to(dtype), lr_scheduler=None)
        trainer = L.Trainer(max_epochs=1, accumulate_grad_batches=4, enable_checkpointing=False, **QUIET, **options)
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=None))
        return found[0]

    exact = gradient(torch.float64, precision="64-true")
    assert (gradient(torch.float16, precision="16-true") - exact).norm() / exact.norm() < 2e-3
    assert (gradient(torch.float32) - exact).norm() / exact.norm() < 1e-5


class NoFloat64(TorchDispatchMode):
    """A device as Apple's, which has no fp64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, function
        return result


@pytest.mark.parametrize("method", METHODS)
def test_devices_without_fp64(method, monkeypatch):
    monkeypatch.setattr(precision, "_NO_FP64", {"cpu"})
    trainer = L.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    model, loader = module(method), torch.utils.data.DataLoader(batches(8), batch_size=None)
    with NoFloat64():
        trainer.fit(model, loader, loader)
        losses, _ = response_losses(trainer, model, batches(8), len(SAMPLES))
    assert losses.dtype == np.float64
    assert np.isfinite(losses).all()
    assert trainer.callback_metrics["val/loss"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing(method):
    model = module(method, gradient_checkpointing=True)
    assert model.student.is_gradient_checkpointing
    assert agrees(fit(model, batches(8)), method)


def test_a_mean_of_means_would_be_caught(monkeypatch):
    """The tests above can fail: normalising each micro-batch by its own count moves the weights measurably."""
    from lightning_itk.methods import module as m

    model = module("sft")
    monkeypatch.setattr(m, "count_targets", lambda batch: torch.tensor(100))
    assert not agrees(fit(model, batches(2), accumulate=4), "sft")


def test_micro_batches_without_a_target_change_nothing():
    empty = b.pad(SAMPLES[:2], pad_id=0, teachers=TAGS)
    empty["labels"] = torch.full_like(empty["labels"], b.IGNORE_INDEX)
    for method in METHODS:
        data = [batch for full in batches(8) for batch in (full, empty)]
        assert agrees(fit(module(method), data, accumulate=2), method)


def test_each_teacher_runs_on_its_own_tokens_only():
    model = module("dae")
    seen: dict[str, int] = dict.fromkeys(model.teachers, 0)
    for name, teacher in model.teachers.items():
        teacher.model.register_forward_pre_hook(
            lambda _, __, kwargs, name=name: seen.__setitem__(name, seen[name] + kwargs["input_ids"].numel()),
            with_kwargs=True,
        )
    for layout in ("packed", "padded"):
        for name in seen:
            seen[name] = 0
        batch = batches(8, layout)[0]
        own = {name: (batch["teacher_ids"] == i).sum().item() for i, name in enumerate(seen)}
        model.losses(batch)
        padding = {"packed": 1.5, "padded": 2.0}[layout]
        assert all(own[name] <= seen[name] <= padding * own[name] for name in seen), (layout, own, seen)


def test_a_batch_without_rows_for_one_teacher_never_calls_it():
    model = module("dae")
    calls = []
    model.teachers["expert"].model.register_forward_pre_hook(lambda *_: calls.append(1))
    own = [sample for sample in SAMPLES if sample.teacher_id == 0][:4]
    terms = model.losses(b.pad(own, pad_id=0, teachers=TAGS))
    assert not calls
    assert terms["distillation/expert"].total == 0
    assert terms["distillation/reference"].total > 0
    sum(term.weight * term.total for term in terms.values()).backward()
    assert model.student.lm_head.weight.grad.abs().sum() > 0
