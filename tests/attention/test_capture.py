"""Captured queries and keys against the models' own attention probabilities; losses attached to layers."""

import copy
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_itk.attention import attention_kl
from lightning_itk.attention.capture import AttentionTap, LayerAttention, install, layer_map

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 5},
    "mixtral": {"num_local_experts": 4},
    "gemma3_text": {"head_dim": 8, **WINDOWS},
    "gemma2": {"head_dim": 8, "attn_logit_softcapping": 2.0, **WINDOWS},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "scale_attn_by_inverse_layer_idx": True},
    "granite": {"attention_multiplier": 0.3},
    "phi3": {},
}


def model_of(family: str = "llama", implementation: str = "sdpa", seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES.get(family, {}) | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:  # scores far from uniform
                parameter.mul_(10)
    return model.eval()


def batches() -> dict[str, dict[str, Tensor]]:
    tokens = torch.randint(1, 64, (2, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, 9:] = 0
    positions = torch.cat([torch.arange(6), torch.arange(7)])
    return {
        "padded": {"input_ids": tokens, "attention_mask": mask, "position_ids": torch.arange(13).expand(2, 13)},
        "packed": {"input_ids": tokens[:1], "position_ids": positions[None]},
    }


def rebuilt(layer: LayerAttention, inputs: dict[str, Tensor]) -> Tensor:
    k = layer.k.repeat_interleave(layer.q.shape[1] // layer.k.shape[1], 1)
    scores = layer.q @ k.mT * layer.scaling
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    position = torch.arange(scores.shape[-1])
    visible = position <= position[:, None]
    if layer.window is not None:
        visible = visible & (position > position[:, None] - layer.window)
    visible = visible[None, None]
    if "attention_mask" in inputs:
        visible = visible & inputs["attention_mask"].bool()[:, None, None]
    else:
        segment = (inputs["position_ids"] == 0).cumsum(1)
        visible = visible & (segment[:, None, :, None] == segment[:, None, None, :])
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_maps_are_the_models_own(family, implementation) -> None:
    if family == "gemma2" and implementation == "sdpa":
        pytest.skip("sdpa has no soft-cap: refused by transformers 5.23, by us before")
    model, eager = model_of(family, implementation), model_of(family, "eager")
    plain = {name: model(**inputs, use_cache=False).logits for name, inputs in batches().items()}
    tap = install(model)
    assert tap.heads == {0: 4, 1: 4, 2: 4}
    assert tap.packed_rows == (0 if family == "opt" else 2)
    for name, inputs in batches().items():
        if name == "packed" and family == "opt":
            continue
        own = eager(**inputs, use_cache=False, output_attentions=True).attentions
        with torch.no_grad(), tap.record() as seen:
            logits = model(**inputs, use_cache=False).logits
        assert torch.equal(logits, plain[name])
        assert torch.equal(model(**inputs, use_cache=False).logits, plain[name])
        assert sorted(seen) == [0, 1, 2]
        rows = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        for layer, probabilities in enumerate(own):
            mine = rebuilt(seen[layer], inputs).transpose(1, 2)[rows]
            torch.testing.assert_close(mine, probabilities.transpose(1, 2)[rows], rtol=0, atol=1e-5)
            assert probabilities[0, :, -1].max(-1).values.mean() > 0.09  # uniform over 13 keys is 0.077
    windows = [seen[layer].window for layer in range(3)]
    expected = {"mistral": [5, 5, 5], "gemma3_text": [4, 4, None], "gemma2": [4, 4, None]}
    assert windows == expected.get(family, [None] * 3)


def test_the_attention_loss_reads_the_same_maps() -> None:
    """attention_kl on captured q, k of two models = KL of their own eager probabilities."""
    student, teacher = model_of("gemma3_text", seed=0), model_of("gemma3_text", seed=1)
    inputs = batches()["padded"]
    maps = [
        model_of("gemma3_text", "eager", seed)(**inputs, use_cache=False, output_attentions=True).attentions
        for seed in (0, 1)
    ]
    rows = inputs["attention_mask"].bool()
    losses, _ = distil(student, teacher, inputs)
    for layer in range(3):
        s, t = maps[0][layer], maps[1][layer]
        pointwise = torch.where(t > 0, t * (t.log() - s.clamp_min(1e-30).log()), 0.0)
        expected = (pointwise.sum(-1).mean(1) * rows).sum()
        torch.testing.assert_close(losses[layer], expected, rtol=1e-4, atol=1e-4)


def distil(
    student: nn.Module,
    teacher: nn.Module,
    inputs: dict[str, Tensor],
    taps: tuple[AttentionTap, AttentionTap] | None = None,
    weight: float = 1.0,
) -> tuple[dict[int, Tensor], Tensor]:
    """What the KD module does: teacher's q and k, then the student's losses inside its forward call."""
    student_tap, teacher_tap = taps or (install(student), install(teacher))
    layers = layer_map(student_tap.num_layers, teacher_tap.num_layers)
    with torch.no_grad(), teacher_tap.record(layers.values()) as targets:
        teacher(**inputs, use_cache=False)
    mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None

    def loss(layer: int, mine: LayerAttention) -> Tensor:
        target = targets[layers[layer]]
        return attention_kl(
            mine.q,
            mine.k,
            target.q,
            target.k,
            scale_student=mine.scaling,
            scale_teacher=target.scaling,
            window=mine.window,
            softcap_student=mine.softcap,
            softcap_teacher=target.softcap,
            key_mask=mask,
            row_mask=mask,
        )

    with student_tap.attach(loss, layers) as losses:
        logits = student(**inputs, use_cache=False).logits
    assert sorted(losses) == sorted(layers)
    return losses, logits.float().log_softmax(-1)[..., 3].sum() + weight * sum(losses.values())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "opt", "mixtral"])
@pytest.mark.parametrize("weight", [0.7, 0.0])
def test_activation_checkpointing_changes_nothing(family, weight) -> None:
    teacher, results = model_of(family, seed=1), []
    for checkpointing in (False, True):
        student = model_of(family).train()
        if checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        losses, total = distil(student, teacher, batches()["padded"], weight=weight)
        (total * 0.3).backward()
        results.append((total.detach(), {k: v.detach() for k, v in losses.items()}, gradients(student)))
    (plain, plain_losses, plain_grads), (again, again_losses, again_grads) = results
    assert torch.equal(plain, again)
    assert plain_losses == again_losses
    assert plain_grads.keys() == again_grads.keys()
    for name in plain_grads:
        torch.testing.assert_close(again_grads[name], plain_grads[name], rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_attention_loss(checkpointing) -> None:
    """Without any other loss the gradient still arrives: nothing depends on the layers' outputs being used."""
    student, teacher = model_of().train(), model_of(seed=1)
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    losses, _ = distil(student, teacher, batches()["packed"])
    sum(losses.values()).backward()
    assert student.model.layers[2].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert student.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert student.lm_head.weight.grad is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_forwards_whose_backwards_interleave(checkpointing) -> None:
    """Two forward calls, then both backwards: the layers that checkpointing repeats use their own call's targets."""
    teacher, grads = model_of(seed=1), []
    first, second = batches()["padded"], {k: v.flip(0) for k, v in batches()["padded"].items()}
    for together in (False, True):
        student = model_of().train()
        if checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        taps = install(student), install(teacher)
        totals = []
        for inputs in (first, second):
            _, total = distil(student, teacher, inputs, taps)
            if together:
                totals.append(total)
            else:
                total.backward()
        for total in totals:
            total.backward()
        grads.append(gradients(student))
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-6, atol=1e-6)


def test_reentrant_checkpointing_is_refused() -> None:
    student, teacher = model_of().train(), model_of(seed=1)
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    student.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="must be non-reentrant"):
        distil(student, teacher, batches()["padded"])


def test_validation_without_gradients() -> None:
    student, teacher = model_of(), model_of(seed=1)
    with torch.no_grad():
        losses, _ = distil(student, teacher, batches()["padded"])
    assert all(not loss.requires_grad and loss > 0 for loss in losses.values())


@pytest.fixture
def one_process() -> Iterator[None]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_distributed_data_parallel(one_process, checkpointing) -> None:
    teacher, results = model_of(seed=1), []
    for parallel in (False, True):
        student = model_of().train()
        if checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        taps = install(student), install(teacher)
        called = nn.parallel.DistributedDataParallel(student) if parallel else student
        for _ in range(2):
            _, total = distil(called, teacher, batches()["padded"], taps)
            total.backward()
        results.append(gradients(student))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fully_sharded(one_process, checkpointing) -> None:
    teacher, results = model_of(seed=1), []
    mesh = init_device_mesh("cpu", (1,))
    for shard in (False, True):
        student = model_of().train()
        if checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        taps = install(student), install(teacher)
        if shard:
            for module in (*student.model.layers, student):
                fully_shard(module, mesh=mesh)
        _, total = distil(student, teacher, batches()["padded"], taps)
        total.backward()
        results.append({name: p.grad.full_tensor() if shard else p.grad for name, p in student.named_parameters()})
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=0)


def test_an_implementation_that_reads_its_own_name() -> None:
    """The flash kernels are found by the name on the module's config: it must be the model's own."""
    names = []

    def attend(module, query, key, value, attention_mask, **kwargs):
        names.append((module.config._attn_implementation, module.layer_idx, module.config.hidden_size))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("my_flash_2", attend)
    AttentionMaskInterface.register("my_flash_2", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = model_of()
    model.config._attn_implementation_internal = "my_flash_2"
    assert install(model).attention == "my_flash_2"
    assert names[:3] == [("my_flash_2", layer, 32) for layer in range(3)]
    assert model.config._attn_implementation == "itk_my_flash_2"


def test_packed_segments_survive_only_without_a_cache() -> None:
    """transformers reads segments off the positions only without a cache, so q and k are refused with a filled one."""
    model = model_of()
    tap = install(model)
    inputs = batches()["packed"]
    cache = model(input_ids=inputs["input_ids"][:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="8 queries and 13 keys; call the model with use_cache=False"), tap.record():
        model(input_ids=inputs["input_ids"][:, 5:], past_key_values=cache)


def test_packing_that_the_model_ignores_is_refused() -> None:
    """OPT hands no positions to its mask: packed samples see each other, whatever the loss is."""
    model = model_of("opt")
    tap = install(model)
    tokens = batches()["packed"]["input_ids"]
    changed = tokens.clone()
    changed[0, 0] = 63 - changed[0, 0]
    logits = [model(input_ids=t, position_ids=batches()["packed"]["position_ids"]).logits for t in (tokens, changed)]
    assert not torch.equal(logits[0][0, 6:], logits[1][0, 6:])  # the second sample sees the first
    with pytest.raises(ValueError, match="OPTForCausalLM with sdpa attention lets packed samples see"), tap.record():
        model(**batches()["packed"], use_cache=False)
    with tap.record():
        model(**batches()["padded"], use_cache=False)


def test_saved_model_does_not_know_the_tap(tmp_path) -> None:
    model = model_of("gemma3_text")
    install(model)
    model.save_pretrained(tmp_path)
    assert "itk" not in json.dumps([path.read_text() for path in tmp_path.glob("*.json")])
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    inputs = batches()["padded"]
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_copies_and_removal() -> None:
    model = model_of()
    tap = install(model)
    inputs = batches()["padded"]
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate(**inputs).logits, model(**inputs).logits)
    generated = model.generate(inputs["input_ids"][:1], max_new_tokens=4, do_sample=False)
    tap.remove()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(generated, model.generate(inputs["input_ids"][:1], max_new_tokens=4, do_sample=False))


def test_training_modes_and_buffers_survive_the_probe() -> None:
    model = model_of().train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    install(model)
    assert before == {name: module.training for name, module in model.named_modules()}


def test_a_composite_model() -> None:
    """Gemma 3 with its vision tower: the text layers are captured, every sub-config keeps working."""
    text = SIZES | FAMILIES["gemma3_text"]
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    from transformers import Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    inputs = batches()["padded"]
    inputs["input_ids"] = inputs["input_ids"] % 60 + 1
    plain = model(**inputs, use_cache=False).logits
    tap = install(model)
    with tap.record([0, 2]) as seen:
        logits = model(**inputs, use_cache=False).logits
    assert torch.equal(logits, plain)
    assert sorted(seen) == [0, 2]


def test_lora() -> None:
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(model_of(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    losses, total = distil(student, model_of(seed=1), batches()["padded"])
    total.backward()
    names = gradients(student).keys()
    assert names
    assert all("lora" in name for name in names)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "falcon",
            {"num_ln_in_parallel_attn": 1},
            r"FalconForCausalLM shows .* no attention.* \[0, 1, 2\] of 3",
        ),
        ("mamba", {}, "MambaForCausalLM shows .* no attention"),
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 8}, "GptOssAttention has attention sinks"),
        (
            "llama4_text",
            {"head_dim": 8, "num_local_experts": 2},
            r"layers \[0, 1, 2\] of Llama4ForCausalLM do not attend",
        ),
    ],
)
def test_models_that_cannot_be_served(family, changes, message) -> None:
    model = model_of(family, "eager", **changes)
    with pytest.raises(ValueError, match=message):
        install(model)
    assert model.config._attn_implementation == "eager"
    assert not model._forward_pre_hooks


def test_a_layer_that_bypasses_the_interface_is_named() -> None:
    model = model_of()
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (attention.o_proj(attention.q_proj(hidden_states)), None)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM shows .* no attention.* layers \[1\] of 3"):
        install(model)
    tap = install(model, layers=[0, 2])
    with (
        pytest.raises(RuntimeError, match=r"LlamaForCausalLM: the attention of layers \[1\] was not seen"),
        tap.record(),
    ):
        model(**batches()["packed"], use_cache=False)


def test_some_layers_only() -> None:
    model = model_of()
    tap = install(model, layers=[1])
    with tap.record([1]) as seen:
        model(**batches()["packed"], use_cache=False)
    assert sorted(seen) == [1]


def test_attention_that_is_not_the_softmax_of_q_and_k_is_named() -> None:
    model = model_of()
    attention = model.model.layers[2].self_attn
    attention.scaling = 0.1
    inner = attention.forward
    attention.forward = lambda hidden_states, attention_mask=None, **kwargs: inner(  # a mask the config does not tell
        hidden_states, attention_mask=torch.eye(hidden_states.shape[1]).bool()[None, None], **kwargs
    )
    with pytest.raises(ValueError, match=r"layers \[2\] of LlamaForCausalLM do not attend by"):
        install(model)


def test_misuse_is_an_error() -> None:
    with pytest.raises(ValueError, match="decoder-only transformers model, found Linear"):
        install(nn.Linear(2, 2))
    model = model_of()
    tap = install(model)
    with pytest.raises(RuntimeError, match=r"layers \[0, 1, 2\] was not seen"), tap.record():
        pass
    with pytest.raises(ValueError, match=r"has layers 0..2, found \[3\]"), tap.record([3]):
        pass
    with pytest.raises(RuntimeError, match="one record or attach at a time"), tap.record(), tap.record():
        pass


def test_layer_map() -> None:
    assert layer_map(3, 3) == {0: 0, 1: 1, 2: 2}
    assert layer_map(2, 6) == {0: 2, 1: 5}
    assert layer_map(4, 32) == {0: 7, 1: 15, 2: 23, 3: 31}
    assert layer_map(6, 2) == {0: 0, 1: 0, 2: 0, 3: 0, 4: 1, 5: 1}
    assert layer_map(4, 32, [-1, 0]) == {3: 31, 0: 7}
    assert layer_map(8, 8, "every:4") == {3: 3, 7: 7}
    assert layer_map(2, 6, {0: 0, 1: 3}) == {0: 0, 1: 3}
    with pytest.raises(ValueError, match=r"the student has layers 0..1, found 2"):
        layer_map(2, 6, [2])
    with pytest.raises(ValueError, match=r"the teacher has layers 0..5, found 6"):
        layer_map(2, 6, {0: 6})
    with pytest.raises(ValueError, match="'every:4' takes the last of every 4 layers, and the student has 3$"):
        layer_map(3, 3, "every:4")
    with pytest.raises(ValueError, match="no student layer"):
        layer_map(2, 6, [])
    with pytest.raises(ValueError, match="found 'some'"):
        layer_map(2, 6, "some")
