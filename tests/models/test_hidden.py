import pytest
import torch
from tiny import EXTRA, ragged_samples, tiny_model

from lightning_itk import batch as b
from lightning_itk.losses.chunked import project
from lightning_itk.models.hidden import check_head, check_packing, head_of, hidden_states

ARCHS = sorted(EXTRA)


@pytest.mark.parametrize("arch", ARCHS)
def test_hidden_states_and_head_make_the_models_own_logits(arch):
    model = tiny_model(arch)
    check_head(model)
    batch = b.pad(ragged_samples(4), pad_id=0)
    expected = model(**b.model_inputs(batch), use_cache=False).logits
    states, head = hidden_states(model, batch)
    logits = project(states.flatten(0, 1), head.prepared(states)).view_as(expected)
    keep = b.real_tokens(batch)
    torch.testing.assert_close(logits[keep], expected[keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", [a for a in ARCHS if a not in ("opt", "gpt_oss")])
def test_packed_logits_equal_unpacked_logits(arch):
    model = tiny_model(arch)
    check_packing(model)
    samples = ragged_samples(6)
    packed = b.pack([samples[:3], samples[3:]], pad_id=0)
    padded = b.pad(samples, pad_id=0)
    together, apart = hidden_states(model, packed).states, hidden_states(model, padded).states
    torch.testing.assert_close(together[b.real_tokens(packed)], apart[b.real_tokens(padded)], rtol=1e-4, atol=1e-5)


def test_the_packing_check_is_not_fooled_by_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_packing(tiny_model("llama"))
    check_packing(tiny_model("llama").bfloat16())


@pytest.mark.parametrize(("arch", "name"), [("opt", "OPT"), ("gpt_oss", "GptOss")])
def test_a_model_that_mixes_packed_samples_is_refused_by_name(arch, name):
    """transformers' OPT makes its own mask and does not look at the positions."""
    with pytest.raises(ValueError, match=rf"{name}ForCausalLM lets packed samples see each other.*packing: false"):
        check_packing(tiny_model(arch))


def test_unknown_logit_processing_is_refused_by_name(monkeypatch):
    model = tiny_model("llama")
    forward = model.forward

    def cubed(**kwargs):
        out = forward(**kwargs)
        out.logits = out.logits**3
        return out

    monkeypatch.setattr(model, "forward", cubed)
    with pytest.raises(ValueError, match="LlamaForCausalLM does something to its logits"):
        check_head(model)


def test_the_head_is_live_and_the_model_is_left_as_it_was():
    model = tiny_model("llama").train()
    batch = b.pad(ragged_samples(2), pad_id=0)
    before = model(**b.model_inputs(batch)).logits
    states, head = hidden_states(model, batch)
    assert head.weight is model.lm_head.weight
    assert states.requires_grad
    check_head(model)
    assert model.training
    assert model(**b.model_inputs(batch)).logits.equal(before)


def test_adapters_on_the_head():
    peft = pytest.importorskip("peft")
    batch = b.pad(ragged_samples(2), pad_id=0)
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="LoRA adapter on the output layer"):
        head_of(peft.get_peft_model(tiny_model("llama"), config))
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("llama"), config)
    states, head = hidden_states(model, batch)
    assert head.weight.requires_grad
    real = b.real_tokens(batch)
    torch.testing.assert_close(
        project(states[real], head.prepared(states)),
        model(**b.model_inputs(batch)).logits[real],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("arch", ["llama", "gemma2", "mistral", "gpt2", "opt"])
def test_padding_on_the_right_needs_no_mask(arch):
    """A mask makes transformers look at it, and the host wait."""
    model, batch, seen = tiny_model(arch), b.pad(ragged_samples(4), pad_id=0), []
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(sorted(kwargs)), with_kwargs=True)
    states, head = hidden_states(model, batch)
    assert seen == [["input_ids", "use_cache"]]
    expected = model(**b.model_inputs(batch)).logits
    real = b.real_tokens(batch)
    torch.testing.assert_close(project(states[real], head.prepared(states)), expected[real], rtol=1e-4, atol=1e-4)
