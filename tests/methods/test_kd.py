"""KD and DAE beyond exactness: closed forms end to end, subclassing, evaluation, refusals."""

import lightning as L
import pytest
import torch
from tiny import ragged_samples, tiny_model

import lightning_itk as itk
from lightning_itk import batch as b
from lightning_itk.losses import LossParts, linear_divergence
from lightning_itk.methods.distillation import AttentionLoss

TAGS = ("", "expert")


def batch(**kwargs):
    return b.pad(ragged_samples(6, teachers=2), pad_id=0, teachers=TAGS, **kwargs)


def mapped(**changes):
    return {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, **changes}


@pytest.mark.parametrize("packed", [False, True])
def test_kd_is_the_published_loss_on_shifted_rows(packed):
    """Both terms of arXiv 2406.19112 from the models' own logits and eager attention maps."""
    student, teacher = tiny_model("llama", 0), tiny_model("llama", 1)
    module = itk.KDModule(student, teacher, temperature=2.0, attention=AttentionLoss(weight=1.0))
    samples = ragged_samples(6)
    data = b.pack([samples[:3], samples[3:]], pad_id=0) if packed else b.pad(samples, pad_id=0)
    terms = module.losses(data)

    one_by_one = b.pad(samples, pad_id=0)
    rows = b.next_token_labels(one_by_one) >= 0
    outs = []
    for seed in (0, 1):
        model = tiny_model("llama", seed, attn_implementation="eager")
        outs.append(model(**b.model_inputs(one_by_one), output_attentions=True))
    log_q, log_p = ((out.logits[rows].double() / 2.0).log_softmax(-1) for out in outs)
    expected = 4.0 * (log_p.exp() * (log_p - log_q)).sum()
    assert terms["kl"].total.item() == pytest.approx(expected.item(), rel=1e-4)
    maps = [torch.stack(out.attentions).double().transpose(1, 2) for out in outs]  # [layers, H, B, S, S]
    q, p = (m[:, :, rows].clamp_min(1e-30) for m in maps)
    expected = (p * (p.log() - q.log())).sum(-1).mean(dim=(0, 1)).sum()
    assert expected > 1
    ours = torch.autograd.grad(terms["attention"].total, module.student.model.layers[1].self_attn.q_proj.weight)[0]
    eager = tiny_model("llama", 0, attn_implementation="eager")
    live = torch.stack(eager(**b.model_inputs(one_by_one), output_attentions=True).attentions).transpose(1, 2)
    live = live[:, :, rows].double().clamp_min(1e-30)
    loss = (p.detach() * (p.detach().log() - live.log())).sum(-1).mean(dim=(0, 1)).sum()
    theirs = torch.autograd.grad(loss, eager.model.layers[1].self_attn.q_proj.weight)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    assert terms["attention"].total.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    module = itk.KDModule(tiny_model("llama", 0), tiny_model("llama", 0), attention=AttentionLoss())
    terms = module.losses(batch())
    assert terms["kl"].total.abs() < 1e-4
    assert terms["attention"].total.abs() < 1e-4
    sum(term.weight * term.total for term in terms.values()).backward()
    assert max(p.grad.abs().max() for p in module.student.parameters()) < 1e-4


def test_every_part_can_be_switched_off_and_is_logged():
    student, teacher = tiny_model("llama", 0), tiny_model("llama", 1)
    terms = itk.KDModule(student, teacher, ce_weight=1.0, kl_weight=0.0).losses(batch())
    assert terms["distillation"].total.item() == pytest.approx(terms["ce"].total.item())
    assert terms["kl"].total > 0
    only_maps = itk.KDModule(student, teacher, kl_weight=0.0, attention=AttentionLoss(layers=[1]))
    assert only_maps.losses(batch())["distillation"].total == 0


def test_dae_is_two_separate_distillations_weighted_by_tokens():
    student, teachers = tiny_model("llama", 0), {"reference": tiny_model("llama", 1), "expert": tiny_model("llama", 2)}
    data = batch()
    terms = itk.DAEModule(student, teachers).losses(data)
    for tag, name in enumerate(teachers):
        own, _ = b.select(data, data["teacher_ids"] == tag)
        alone = itk.KDModule(student, teachers[name]).losses(own)
        assert terms[f"kl/{name}"].total.item() == pytest.approx(alone["kl"].total.item(), rel=1e-5)
        assert terms[f"distillation/{name}"].elements == b.count_targets(own)


def test_evaluation_reports_the_teachers_beside_the_student():
    module = itk.DAEModule(
        tiny_model("llama", 0),
        {"reference": tiny_model("llama", 0), "expert": tiny_model("llama", 2)},
        attention=AttentionLoss(),
    )
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (metrics,) = trainer.validate(module, torch.utils.data.DataLoader([batch()], batch_size=None), verbose=False)
    assert metrics["val/teacher_agreement/reference"] == 1.0
    assert metrics["val/kl/reference"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["val/kl/expert"] > 0.01
    assert metrics["val/teacher_response_loss/reference"] == pytest.approx(metrics["val/ce/reference"], rel=1e-5)
    assert metrics["val/attention/expert"] > 0
    assert metrics["val/perplexity"] == pytest.approx(torch.tensor(metrics["val/response_loss"]).exp().item(), rel=1e-5)


def test_a_users_own_divergence_and_extra_term():
    class TotalVariation(itk.KDModule):
        def divergence(self, states, head, teacher_states, teacher_head, targets):
            loss = linear_divergence(
                lambda s, t, _: (s.softmax(-1) - t.softmax(-1)).abs().sum(-1) / 2,
                states, head, teacher_states, teacher_head, targets,
            )  # fmt: skip
            return LossParts(loss, torch.zeros(()), loss.detach())

        def losses(self, batch):
            states, _ = self.student_states(batch)
            return super().losses(batch) | {"norm": itk.Term(states.square().sum(), 0.1)}

    module = TotalVariation(tiny_model("llama", 0), tiny_model("llama", 1), attention=AttentionLoss())
    calls = []
    module.student.register_forward_hook(lambda *_: calls.append(1))
    terms = module.losses(batch())
    assert len(calls) == 1  # both terms share one forward pass
    assert 0 < terms["kl"].total < b.count_targets(batch())
    assert terms["norm"].weight == 0.1


def test_divergence_is_a_hook_of_dae_too():
    class Squares(itk.DAEModule):
        def divergence(self, states, head, teacher_states, teacher_head, targets):
            assert (targets >= 0).all()  # response rows only
            loss = linear_divergence(
                lambda s, t, _: (s - t).square().mean(-1), states, head, teacher_states, teacher_head, targets
            )
            return LossParts(loss, torch.zeros(()), loss.detach())

    teachers = {"reference": tiny_model("llama", 0), "expert": tiny_model("llama", 2)}
    terms = Squares(tiny_model("llama", 0), teachers).losses(batch())
    assert terms["distillation/reference"].total == 0
    assert terms["distillation/expert"].total > 0
    assert terms["distillation/expert"].total == terms["kl/expert"].total


def test_deeper_and_wider_teachers():
    teacher = tiny_model("llama", 1, **mapped(num_hidden_layers=6))
    terms = itk.KDModule(tiny_model("llama", 0), teacher, attention=AttentionLoss()).losses(batch())
    assert terms["attention"].total > 0
    terms = itk.KDModule(
        tiny_model("llama", 0), teacher, attention=AttentionLoss(layers={0: 5}, head_map=[7, 0, 1, 2])
    ).losses(batch())
    assert terms["attention"].total > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"kl_weight": -1.0}, "kl_weight must not be negative"),
        ({"kl_weight": 0.0}, "nothing to learn"),
        ({"beta": 2.0}, "beta must be in"),
        ({"kind": "unknown"}, "kind must be"),
        ({"attention": AttentionLoss(layers=[7])}, "the student has layers 0..1, found 7"),
        ({"attention": AttentionLoss(layers="some")}, 'expected "all"'),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        itk.KDModule(tiny_model("llama", 0), tiny_model("llama", 1), **kwargs)


def test_attention_refusals_name_the_models():
    with pytest.raises(ValueError, match="has 1 layers and the student 2"):
        itk.KDModule(tiny_model("llama"), tiny_model("llama", 1, num_hidden_layers=1), attention=AttentionLoss())
    odd = tiny_model("llama", 1, hidden_size=36, num_attention_heads=6, num_key_value_heads=2)
    with pytest.raises(ValueError, match="student has 4 heads and teacher '' 6|has 4 heads"):
        itk.KDModule(tiny_model("llama"), odd, attention=AttentionLoss())
    for weight in (-1.0,):
        with pytest.raises(ValueError, match="attention.weight must not be negative"):
            AttentionLoss(weight=weight)
    windowed = itk.KDModule(tiny_model("llama", 0), tiny_model("mistral", 1), attention=AttentionLoss())
    with pytest.raises(ValueError, match=r"sees (all|6) keys"):
        windowed.losses(batch())


def test_dae_refusals():
    student, teacher = tiny_model("llama"), tiny_model("llama", 1)
    with pytest.raises(ValueError, match="teachers is empty"):
        itk.DAEModule(student, {})
    with pytest.raises(ValueError, match="'expert' is not among teachers: reference"):
        itk.DAEModule(student, {"reference": teacher}, teacher_weights={"expert": 1.0})
    with pytest.raises(ValueError, match=r"teacher_weights.reference must not be negative"):
        itk.DAEModule(student, {"reference": teacher}, teacher_weights={"reference": -1.0})
    module = itk.DAEModule(student, {"reference": teacher})
    with pytest.raises(ValueError, match="the data names teacher 'expert', but this module has reference"):
        module.losses(batch())
