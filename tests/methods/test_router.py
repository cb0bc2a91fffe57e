"""The load-balancing loss of a student that is a mixture: what it is, that a step is exact, whom it leaves alone."""

import copy
import functools

import lightning as L
import pytest
import torch
from exact import SAMPLES, TAGS, batches
from tiny import QUIET, ragged_samples, routed_model, tiny_model
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import lightning_itk as itk
from lightning_itk import batch as b
from lightning_itk.losses.router import chosen_experts, router_balance
from lightning_itk.methods.distillation import AttentionLoss

WEIGHT = 3.0  # large, so that the term moves the weights as much as the others do


def double():
    """torch's grouped products know no fp64."""
    model = routed_model().double()
    model.set_experts_implementation("eager")
    return model


def module(method: str = "sft", student=None, **options):
    common = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.3), "lr_scheduler": None, "router_weight": WEIGHT}
    student, teacher = student or routed_model(), routed_model(1, num_hidden_layers=4)
    if method == "sft":
        return itk.SFTModule(student, **{**common, **options})
    common |= {"attention": AttentionLoss(weight=0.5), **options}
    if method == "kd":
        return itk.KDModule(student, teacher, ce_weight=0.3, **common)
    return itk.DAEModule(student, {"reference": teacher, "expert": routed_model(2)}, **common)


def fit(model, data, accumulate: int = 1, **options) -> torch.Tensor:
    options |= {"max_epochs": 2, "accumulate_grad_batches": accumulate, "enable_checkpointing": False}
    trainer = L.Trainer(**QUIET, gradient_clip_val=0.5, **options)
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=None))
    return torch.cat([parameter.detach().flatten() for parameter in model.student.parameters()])


@functools.cache
def reference(method: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights before, after, and after the same steps without the term."""
    before = torch.cat([parameter.detach().flatten() for parameter in routed_model().parameters()])
    return before, fit(module(method), batches(8)), fit(module(method, router_weight=0.0), batches(8))


def agrees(weights: torch.Tensor, method: str) -> bool:
    before, after, without = reference(method)
    assert (after - without).norm() > 0.05 * (after - before).norm()
    return bool((weights - after).norm() < 1e-4 * (after - without).norm())


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "granitemoe", "phimoe"])
def test_it_is_transformers_loss_layer_by_layer(arch):
    """Where the load is that of the batch itself, and every sample has as many response tokens as others."""
    model = routed_model(arch=arch)
    samples = [sample._replace(labels=sample.input_ids) for sample in ragged_samples(6)]
    samples = [s._replace(input_ids=s.input_ids[:9], labels=s.labels[:9]) for s in samples if len(s.input_ids) >= 9]
    data = b.pad(samples, pad_id=0, multiple=16)
    logits = model(**b.model_inputs(data), output_router_logits=True).router_logits
    shares = b.sample_shares(data).flatten()
    k = model.config.num_experts_per_tok
    for layer in logits:
        load = chosen_experts(layer, shares, k) / shares.sum()
        ours = router_balance(layer, shares, load) / shares.sum()
        theirs = load_balancing_loss_func((layer,), layer.shape[-1], k, data["attention_mask"])
        assert load.sum().item() == pytest.approx(k)
        torch.testing.assert_close(ours, theirs.to(ours))
        for one, other in zip(torch.autograd.grad(ours, layer, retain_graph=True),
                              torch.autograd.grad(theirs, layer, retain_graph=True), strict=True):  # fmt: skip
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_term_and_its_gradient_against_fp64(layout):
    """From the probabilities, sample by sample, in fp64; the load is that of another batch, a step earlier."""
    model = module(student=double())
    before, now = (batches(8, layout)[i] for i in (0, 1))
    sums = model._router.sums(model.forward_pass(before))
    model._router.end_step({**sums, "targets": b.count_targets(before)})
    run = model.forward_pass(now)
    term = model._router.add_to({}, run)["router"]
    assert term.weight == WEIGHT

    whole = double()
    gates = [parameter for name, parameter in whole.named_parameters() if "gate.weight" in name]

    def means(samples) -> tuple[torch.Tensor, torch.Tensor]:
        """Load and probability [layers, experts], weighted by the samples' response tokens."""
        load, mean, count = 0, 0, 0
        for sample in samples:
            alone = b.pad([sample], pad_id=0)
            logits = torch.stack(whole(input_ids=alone["input_ids"], output_router_logits=True).router_logits)
            p, responses = logits.softmax(-1), int(b.count_targets(alone))
            top = p.topk(2, dim=-1).indices
            load = load + responses * torch.nn.functional.one_hot(top, 4).double().sum(2).mean(1)
            mean, count = mean + responses * p.mean(1), count + responses
        return load / count, mean / count

    load, _ = means(SAMPLES[:8])
    _, mean = means(SAMPLES[8:16])
    expected = 4 * (load * mean).sum(-1).mean()
    assert (load - 0.5).abs().max() > 0.1
    ours = term.total / b.count_targets(now)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    own = [parameter for name, parameter in model.student.named_parameters() if "gate.weight" in name]
    for one, other in zip(torch.autograd.grad(ours, own), torch.autograd.grad(expected, gates), strict=True):
        assert other.norm() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", ["sft", "kd", "dae"])
@pytest.mark.parametrize("how", ["micro-batches", "packed", "wide", "checkpointing"])
def test_a_step_does_not_depend_on_how_its_samples_are_cut(method, how):
    if how == "micro-batches":
        assert agrees(fit(module(method), batches(2), accumulate=4), method)
    elif how == "checkpointing":
        assert agrees(fit(module(method, gradient_checkpointing=True), batches(8)), method)
    else:
        assert agrees(fit(module(method), batches(8, how)), method)


def test_a_load_of_each_micro_batch_would_be_caught(monkeypatch):
    """As transformers does it: the test above can fail."""
    from lightning_itk.methods.router import RouterLoss

    own = RouterLoss.add_to

    def at_once(self, terms, batch):
        self.end_step({**self.sums(batch), "targets": b.count_targets(batch)})
        return own(self, terms, batch)

    monkeypatch.setattr(RouterLoss, "add_to", at_once)
    one, other = fit(module(), batches(8)), fit(module(), batches(2), accumulate=4)
    before, after, without = reference("sft")
    assert (one - other).norm() > 0.01 * (after - without).norm()


def test_it_balances():
    """Uneven routers learn to use all experts; the first step, before anything is known, pushes nowhere."""
    seen = []

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.norm = float(pl_module.student.model.layers[1].mlp.gate.weight.grad.norm())

        def on_train_batch_end(self, trainer, pl_module, *_):
            load = torch.tensor(pl_module._router.state())
            assert trainer.callback_metrics["train/router_max_load"].item() == pytest.approx(2 * load.max().item())
            uneven = (load - 0.5).abs().max()
            seen.append((float(uneven), self.norm))

    def train(weight: float) -> list[tuple[float, float]]:
        seen.clear()
        model = module(router_weight=weight, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
        options = {"max_epochs": 12, "enable_checkpointing": False, "callbacks": [Look()], "log_every_n_steps": 1}
        L.Trainer(**QUIET, **options).fit(model, torch.utils.data.DataLoader(batches(8)[:3], batch_size=None))
        return list(seen)

    with_term, hardly = train(0.02), train(1e-12)
    assert with_term[0] == pytest.approx(hardly[0], rel=1e-4)
    assert with_term[1][1] > 1.1 * hardly[1][1]
    ends = [sum(uneven for uneven, _ in steps[-6:]) / 6 for steps in (with_term, hardly)]
    assert ends[0] < 0.75 * ends[1]


def test_off_unless_the_configuration_asks():
    data = batches(8)[0]
    for changes, weight in (
        ({}, 0.0),
        ({"output_router_logits": True, "router_aux_loss_coef": 0.25}, 0.25),
        ({"output_router_logits": True, "router_aux_loss_coef": 0.0}, 0.0),
    ):
        model = itk.SFTModule(tiny_model("mixtral", **changes))
        assert model._router.weight == weight
        terms = model._router.add_to(model.losses(data), model.forward_pass(data))
        assert ("router" in terms) == (weight > 0)
    assert itk.SFTModule(tiny_model("mixtral", output_router_logits=True), router_weight=0.0)._router.weight == 0
    assert itk.SFTModule(tiny_model())._router.weight == 0


@pytest.mark.parametrize(
    ("arch", "weight", "message"),
    [
        ("llama", 0.1, "LlamaForCausalLM has no routers"),
        ("mixtral", -1.0, "router_weight must be finite and not negative"),
        ("mixtral", float("nan"), "router_weight must be finite and not negative"),
    ],
)
def test_refusals(arch, weight, message):
    with pytest.raises(ValueError, match=message):
        itk.SFTModule(tiny_model(arch), router_weight=weight)


def test_probabilities_are_not_taken_for_logits():
    """Some versions of transformers show them instead."""
    model = tiny_model("mixtral")
    gate = type(model.model.layers[0].mlp.gate)
    own = gate.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "forward", lambda self, x: (lambda out: (out[0].softmax(-1), *out[1:]))(own(self, x)))
        with pytest.raises(ValueError, match="does not show its routers' logits"):
            itk.SFTModule(model, router_weight=0.1)


def test_a_users_term_of_that_name_is_refused():
    class Mine(itk.SFTModule):
        def losses(self, batch):
            return super().losses(batch) | {"router": itk.Term(self.student_states(batch).states.sum())}

    with pytest.raises(ValueError, match="router: a term of losses has the name"):
        fit(Mine(routed_model(), router_weight=0.1), batches(8))


def test_a_teachers_router_is_left_alone():
    student, teacher = routed_model(), routed_model(1, num_hidden_layers=4, output_router_logits=True)
    before = copy.deepcopy(teacher.state_dict())
    model = itk.KDModule(
        student,
        teacher,
        attention=AttentionLoss(),
        router_weight=WEIGHT,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.3),
    )
    fit(model, batches(8))
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.teacher.model.state_dict().items())
    assert not model.student.config.output_router_logits


def test_a_batch_without_a_response_token_moves_nothing():
    empty = b.pad(SAMPLES[:2], pad_id=0, teachers=TAGS)
    empty["labels"] = torch.full_like(empty["labels"], b.IGNORE_INDEX)
    data = [batch for full in batches(8) for batch in (full, empty)]
    assert agrees(fit(module(), data, accumulate=2), "sft")


def test_bf16_mixed():
    """A step trains, and the error of term and gradient is that of logits in bf16."""
    found = []
    for autocast in (False, True):
        model, (before, now, *_) = module(), batches(8)
        model._router.end_step({**model._router.sums(model.forward_pass(before)), "targets": b.count_targets(before)})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            total = model._router.add_to({}, model.forward_pass(now))["router"].total
        gates = [parameter for name, parameter in model.student.named_parameters() if "gate.weight" in name]
        found.append((total.detach(), *torch.autograd.grad(total, gates)))
    for exact, half in zip(*found, strict=True):
        assert half.dtype == torch.float32
        assert (half - exact).norm() < 0.02 * exact.norm()
    before, after, _ = reference("kd")
    assert (fit(module("kd"), batches(8), precision="bf16-mixed") - after).norm() < 0.5 * (after - before).norm()


def test_shares():
    for layout in ("padded", "packed", "wide"):
        for batch in batches(8, layout):
            shares, real = b.sample_shares(batch), b.real_tokens(batch)
            assert shares.sum().item() == pytest.approx(b.count_targets(batch).item())
            assert not shares[~real].any()
            labels = b.next_token_labels(batch) >= 0
            for sample in batch["sample_ids"][real].unique():
                own = batch["sample_ids"] == sample
                expected = (labels & own).sum() / own.sum()
                torch.testing.assert_close(shares[own], expected.expand(own.sum()))
