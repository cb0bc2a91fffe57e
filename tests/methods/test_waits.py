"""How often a micro-batch makes the host wait for its device; a step that never waits keeps a GPU busy."""

import lightning as L
import pytest
import torch
from exact import batches
from tiny import routed_model, tiny_model
from waits import Away, Waits, send

import lightning_itk as itk
from lightning_itk import batch as b


def module(method: str) -> itk.InstructionModule:
    name, _, attention = method.partition("+")
    student, loss = tiny_model("llama", 0), itk.AttentionLoss() if attention else None
    if name == "sft":
        return itk.SFTModule(student)
    if name == "kd":
        return itk.KDModule(student, tiny_model("llama", 1), attention=loss, ce_weight=0.3)
    teachers = {"reference": tiny_model("llama", 1), "expert": tiny_model("llama", 2)}
    return itk.DAEModule(student, teachers, attention=loss)


def step(model, batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model._loss_scale = 1.0  # found out once in a run
    total = model.training_step(batch, 0)
    return total.detach(), list(torch.autograd.grad(total, list(model.student.parameters())))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("method", ["sft", "kd", "dae", "kd+attention", "dae+attention"])
@pytest.mark.parametrize("copy", [True, False], ids=["copy", "no copy"])
def test_a_micro_batch_waits_for_nothing(method, layout, copy):
    """But once where the copy that was sent is not at hand, and once in every model that runs, where transformers
    looks whether a batch is packed."""
    model, batch = module(method), batches(8, layout)[1]
    expected, gradients = step(model, batch)
    send(model)
    with Waits() as waits:
        arrived = b.Batch(**send(dict(batch)))
        total, found = step(model, b.keep_host_copy(arrived, batch) if copy else arrived)
    runs = {"sft": 1, "kd": 2, "dae": 3}[method.partition("+")[0]]
    of_transformers = sum(count for place, count in waits.places.items() if "transformers/" in place)
    assert of_transformers <= runs, waits.places
    assert waits.places.total() - of_transformers == (not copy), waits.places
    # The device did what a CPU does: nothing was counted for numbers that went missing.
    torch.testing.assert_close(total.here, expected)
    for here, there in zip(gradients, found, strict=True):
        torch.testing.assert_close(there.here, here, rtol=1e-4, atol=1e-5)


def test_the_load_balancing_loss_waits_for_nothing():
    model, (before, now, *_) = itk.SFTModule(routed_model(), router_weight=0.1), batches(8)
    runs = [model.forward_pass(batch) for batch in (before, now)]

    def look() -> torch.Tensor:
        model._router.restore(None)
        sums = {name: value.double() for name, value in model._router.sums(runs[0]).items()}
        model._router.end_step({**sums, "targets": sums["router/chosen"][0].sum() / 2})
        return model._router.add_to({}, runs[1])["router"].total.detach()

    expected = look()
    for run in runs:
        there, run.student.router_logits = run.student.router_logits, ()
        run.student = type(run.student)(send(run.student.states.detach()), run.student.head)
        run.student.router_logits = tuple(send(logits.detach()) for logits in there)
    with Waits() as waits:
        found = look()
    assert not waits.places
    torch.testing.assert_close(found.here, expected)


CHANGES = {
    "replaced": lambda batch: {**batch, "labels": batch["labels"].clone()},
    "written to": lambda batch: (batch["labels"].fill_(b.IGNORE_INDEX), batch)[1],
    "taken out": lambda batch: {key: value for key, value in batch.items() if key != "attention_mask"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_batch_that_was_changed_on_the_device_is_looked_at_there(change):
    batch = batches(8, "padded")[1]
    with Waits() as waits:
        arrived = b.keep_host_copy(b.Batch(**send(dict(batch))), batch)
        assert b.on_host(arrived) is batch
        changed = b.Batch(**CHANGES[change](arrived))
        host = b.on_host(changed)
    assert waits.places.total() == 1
    for key, value in host.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, changed[key].here), key


def test_the_module_keeps_what_it_sends(monkeypatch):
    """A batch of the CPU that stays there needs no copy; one that leaves keeps it."""
    model, batch = module("sft"), batches(8, "padded")[1]
    assert "host_copy" not in model.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert model.transfer_batch_to_device([torch.ones(2)], torch.device("cpu"), 0)[0].sum() == 2  # somebody's own
    arrived = b.Batch(**{k: Away(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
    monkeypatch.setattr(L.LightningModule, "transfer_batch_to_device", lambda *_: arrived)
    assert b.on_host(model.transfer_batch_to_device(batch, torch.device("cuda"), 0)) is batch


@pytest.mark.parametrize(
    ("wait", "count"),
    [
        (lambda t: t.sum().item(), 1),
        (lambda t: t.tolist(), 1),
        (lambda t: t.cpu() + 1, 1),
        (lambda t: bool(t.any()), 1),
        (lambda t: t.nonzero(), 1),
        (lambda t: t[t > 1], 1),
        (lambda t: t.unique(), 1),
        (lambda t: t.repeat_interleave(t), 1),
        (lambda t: t.new_tensor([1, 2]), 1),
        (lambda t: t[torch.tensor([0, 2])], 1),
        (lambda t: torch.arange(3).to(t.device), 1),
        (lambda t: torch.arange(3).to(t.device, non_blocking=True) + t, 0),
        (lambda t: t[t.argsort()].masked_fill(t > 1, 0) + torch.ones(3, device=t.device), 0),
    ],
)
def test_the_device_counts(wait, count):
    with Waits() as waits:
        wait(send(torch.arange(3)))
    assert waits.places.total() == count
