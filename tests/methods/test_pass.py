"""A step is one explicit value: whoever calls a module's losses, and however often, nothing is remembered."""

import lightning as L
import pytest
import torch
from exact import METHODS, SAMPLES, TAGS, batches, module
from tiny import tiny_model

import lightning_itk as itk
from lightning_itk import batch as b
from lightning_itk.data.loader import collate
from lightning_itk.methods.step import weighted_sum

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.student.parameters()])


def fit(model, data, **options) -> torch.Tensor:
    L.Trainer(**QUIET, **{"max_epochs": 1, **options}).fit(model, torch.utils.data.DataLoader(data, batch_size=None))
    return weights(model)


def gradients(model, terms) -> list[torch.Tensor]:
    total = sum(term.weight * term.total for term in terms.values())
    return list(torch.autograd.grad(total, list(model.student.parameters())))


@pytest.mark.parametrize("method", METHODS)
def test_losses_may_be_asked_for_at_any_time(method):
    model, (batch, *_) = module(method), batches(8)
    first = gradients(model, model.losses(batch))
    with torch.no_grad():
        silent = model.losses(batch)
    again = model.losses(batch)
    assert all(silent[name].total.equal(term.total.detach()) for name, term in again.items())
    assert all(a.equal(b) for a, b in zip(first, gradients(model, again), strict=True))
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.mul_(1.1)
    fresh = module(method)
    fresh.student.load_state_dict(model.student.state_dict())
    for name, term in fresh.losses(batch).items():
        assert term.total.equal(model.losses(batch)[name].total), name
        assert not term.total.equal(again[name].total), name


@pytest.mark.parametrize("method", METHODS)
def test_a_callback_that_looks_at_the_loss_changes_no_step(method):
    class Look(L.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with torch.no_grad():
                self.seen.append(sum(t.weight * t.total for t in pl_module.losses(batch).values()))

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            pl_module.losses(batches(8)[0])

    look = Look()
    assert fit(module(method), batches(8), callbacks=[look]).equal(fit(module(method), batches(8)))
    assert len(look.seen) == 4


def full_batch_lbfgs(student, batch, steps: int) -> torch.Tensor:
    """Plain torch on the mean loss of one batch."""
    optimizer = torch.optim.LBFGS(student.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")
    labels = b.next_token_labels(batch)

    def closure():
        optimizer.zero_grad()
        logits = student(**b.model_inputs(batch)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return torch.cat([parameter.detach().flatten() for parameter in student.parameters()])


def test_lbfgs_evaluates_its_closure_as_often_as_it_likes():
    (batch,) = batches(8)[:1]
    model = itk.SFTModule(
        tiny_model().double(),
        dtype="float64",
        optimizer=lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"),
        lr_scheduler=None,
    )
    ours = fit(model, [batch], max_epochs=3)
    start, expected = weights(module("sft")).double(), full_batch_lbfgs(tiny_model().double(), batch, 3)
    assert (ours - expected).norm() / (expected - start).norm() < 1e-6


@pytest.mark.parametrize("how", ["plain", "accumulate", "skip", "clip", "lbfgs"])
def test_gradients_are_gone_before_the_next_forward_pass(how):
    """Lightning frees them between forward and backward: beside all activations, the peak of a step."""
    held = []

    class Look(itk.SFTModule):
        def training_step(self, batch, batch_idx):
            held.append(sum(parameter.grad is not None for parameter in self.student.parameters()))
            total = super().training_step(batch, batch_idx)
            return total * torch.inf if how == "skip" and batch_idx == 1 else total

    optimizer = {"lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=1)}.get(how, lambda p: torch.optim.AdamW(p, lr=1e-3))
    options = {"accumulate": {"accumulate_grad_batches": 2}, "clip": {"gradient_clip_val": 0.1}}.get(how, {})
    model = Look(tiny_model(), optimizer=optimizer, lr_scheduler=None, nonfinite="skip" if how == "skip" else "stop")
    fit(model, batches(8), **options)
    whole = len(list(model.student.parameters()))
    assert held == [0, whole, 0, whole] if how == "accumulate" else not any(held)


class TwoOptimizers(itk.SFTModule):
    """The head and the rest, each with an optimizer of its own, stepped by hand after one backward."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def configure_optimizers(self):
        head = self.student.lm_head.weight
        rest = [parameter for parameter in self.student.parameters() if parameter is not head]
        return [torch.optim.SGD([head], lr=0.3), torch.optim.SGD(rest, lr=0.3)]

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if (batch_idx + 1) % 2 == 0:  # accumulates two micro-batches by hand
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()


def test_two_optimizers_under_manual_optimization_share_the_step():
    ours = fit(TwoOptimizers(tiny_model()), batches(4)[:6])
    expected = fit(module("sft"), batches(8)[:3])
    start = weights(module("sft"))
    assert (ours - expected).norm() / (expected - start).norm() < 1e-5


def test_a_hooks_calls_share_one_run_of_the_models():
    class Extra(itk.KDModule):
        def losses(self, batch):
            hidden, _, _ = self.response_states(batch)
            return super().losses(batch) | {"norm": itk.Term(hidden.square().sum(), 0.1)}

        def evaluate(self, batch):
            """Without the figures of the base."""
            return {"width": itk.Term(self.student_states(batch).states.abs().sum())}

    model = Extra(tiny_model("llama", 0), tiny_model("llama", 1))
    calls = []
    for part in (model.student, model.teacher.model):
        part.register_forward_hook(lambda *_: calls.append(1))
    model.losses(batches(8)[0])
    assert len(calls) == 2
    loader = torch.utils.data.DataLoader(batches(8)[:1], batch_size=None)
    (metrics,) = L.Trainer(**QUIET).validate(model, loader, verbose=False)
    assert len(calls) == 4
    assert {"val/width", "val/norm", "val/loss"} <= metrics.keys()
    assert "val/response_loss" not in metrics


@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize("samples", ["none", "the expert's"])
def test_no_parameter_is_left_without_a_gradient(samples, weight):
    """Under DDP and FSDP2 the other ranks wait for all of them: an untied head's too."""
    student, teachers = tiny_model("llama", 0), {"reference": tiny_model("llama", 1), "expert": tiny_model("llama", 2)}
    model = itk.DAEModule(student, teachers, teacher_weights={"expert": weight})
    experts = [sample for sample in SAMPLES if sample.teacher_id == 1][:2]
    empty = collate([], pad_id=0, teachers=TAGS, packing=False)
    batch = empty if samples == "none" else b.pad(experts, pad_id=0, teachers=TAGS)
    teachers["reference"].forward = None  # never asked
    total = weighted_sum(model.losses(batch))
    grads = torch.autograd.grad(total, list(model.student.parameters()), allow_unused=True)
    assert all(grad is not None for grad in grads)
    assert any(grad.any() for grad in grads) == (samples != "none" and weight > 0)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (lambda total: {"mine": total}, "losses must return Terms by name, found 'mine': Tensor"),
        (lambda total: {"loss": itk.Term(total)}, "found 'loss': the name of their sum"),
        (lambda total: {"mine": itk.Term(total, 0.0)}, "nothing to learn: no term of the loss has a weight"),
        (lambda total: {"token_accuracy": itk.Term(total)}, "token_accuracy: a term of the loss and a figure of"),
    ],
)
def test_what_is_no_loss_is_one_clear_line(terms, message):
    class Wrong(itk.SFTModule):
        def losses(self, batch):
            return terms(super().losses(batch)["ce"].total)

    loader = torch.utils.data.DataLoader(batches(8)[:1], batch_size=None)
    with pytest.raises(ValueError, match=message):
        L.Trainer(**QUIET).validate(Wrong(tiny_model()), loader, verbose=False)
