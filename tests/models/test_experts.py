"""A student of some of a mixture's experts, or of one in each layer: which stay, what is in it, where it trains."""

import copy
import json
from itertools import islice

import lightning as L
import pytest
import torch
from commands import RECORDS, refused
from tiny import QUIET, byte_tokenizer, ragged_samples, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lightning_itk as itk
from lightning_itk import batch as b
from lightning_itk import cli
from lightning_itk.cli.console import one_source
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.sources import read
from lightning_itk.methods.distillation import AttentionLoss
from lightning_itk.models.experts import count_experts, dense, expert_use, experts_to_keep, keep_experts
from lightning_itk.models.pruning import expert_blocks, keep_layers, original_layers

IDS = torch.arange(3, 15)[None]
MIXTURES = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "granitemoe", "phimoe", "gpt_oss"]


def mixture(arch: str = "mixtral", seed: int = 0, **changes):
    """Weights that differ everywhere, biases and norms too, and routers with opinions."""
    model = tiny_model(arch, seed, num_hidden_layers=3, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 if "gate.weight" in name else 0.05))
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def router(model, block: str) -> torch.nn.Module:
    module = model.get_submodule(block)
    return module.gate if hasattr(module, "gate") else module.router


@pytest.mark.parametrize("arch", MIXTURES)
def test_use_is_the_routing_weight(arch):
    model = mixture(arch)
    found = expert_use(model, [IDS[0].numpy(), IDS[0, :5].numpy()])
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for ids in (IDS, IDS[:, :5]):
        for row, block in enumerate(expert_blocks(model).values()):
            seen = []
            handle = router(model, block).register_forward_hook(lambda _, args, out, seen=seen: seen.append(out))
            with torch.no_grad():
                model(ids)
            handle.remove()
            parts = seen[0] if len(seen[0]) == 3 else (None, *seen[0])
            weights, chosen = sorted(parts[1:], key=lambda t: not t.is_floating_point())
            for token in range(ids.shape[1]):
                for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
                    expected[row, expert] += weight
    torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("experts", "kept"), [("1", [[2], [0]]), ("2", [[1, 2], [0, 1]]), ("dense", [[2], [0]])])
def test_what_experts_says(experts, kept):
    assert experts_to_keep(experts, torch.tensor([[0.1, 0.3, 0.6], [0.4, 0.3, 0.3]])) == kept


@pytest.mark.parametrize("experts", ["3", "0", "-1", "4", "", "all", "1.5", "0,1", "²"])
def test_what_experts_cannot_say(experts):
    with pytest.raises(ValueError, match="expected a number below 3"):
        experts_to_keep(experts, torch.ones(2, 3))


def without(model, gone: list[int]) -> torch.Tensor:
    """The logits of a mixture whose routers give one expert of each layer the logit -inf."""
    blocks = {
        id(router(model, block).weight): lost for block, lost in zip(expert_blocks(model).values(), gone, strict=True)
    }
    plain = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        out = plain(x, weight, bias)
        return out.index_fill(-1, torch.tensor(blocks[id(weight)]), -torch.inf) if id(weight) in blocks else out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        return logits(model)


@pytest.mark.parametrize("arch", MIXTURES)
def test_a_student_routes_among_the_experts_that_are_left(arch, tmp_path):
    """As the whole model would if the others did not exist; also from its folder."""
    model = mixture(arch)
    before = copy.deepcopy(model.state_dict())
    kept = [[0, 2, 3], [0, 1, 2], [1, 2, 3]]
    student = keep_experts(model, kept)
    assert count_experts(student) == 3
    for block, own in zip(expert_blocks(model).values(), kept, strict=True):
        experts = model.get_submodule(block).experts
        for name, parameter in student.get_submodule(block).experts.named_parameters():
            assert torch.equal(parameter, experts.get_parameter(name)[own])
    expected = without(model, [1, 3, 0])
    assert (expected - logits(model)).abs().max() > 1e-3
    torch.testing.assert_close(logits(student), expected)
    student.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())  # copies


@pytest.mark.parametrize(("arch", "kind"), [("mixtral", "mistral"), ("qwen3_moe", "qwen3")])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True, "sliding_window": 6, "use_sliding_window": True}]
)
def test_a_mixture_that_always_chooses_one_expert_is_dense(arch, kind, changes, tmp_path):
    model, kept = mixture(arch, num_experts_per_tok=1, **changes), [2, 0, 3]
    gates = [router(model, block) for block in expert_blocks(model).values()]
    for gate, expert in zip(gates, kept, strict=True):
        gate.register_forward_hook(
            lambda _, args, out, expert=expert: (out[0], torch.ones_like(out[1]), torch.full_like(out[2], expert))
        )
    student = dense(model, kept)
    assert student.config.model_type == kind
    torch.testing.assert_close(logits(student), logits(model), rtol=1e-5, atol=1e-6)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
    assert loaded.config.pruned == {"layers": [0, 1, 2], "of": 3, "experts": [[2], [0], [3]], "experts_of": 4}
    assert not any("expert" in key or "router" in key for key in loaded.config.to_dict())
    assert loaded.config.tie_word_embeddings == bool(changes)


def test_precision_stays_and_the_whole_routing_weight_is_the_experts():
    model = mixture().bfloat16()
    for student in (keep_experts(model, [[1]] * 3), dense(model, [1] * 3)):
        assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
        assert student.dtype == torch.bfloat16
        torch.testing.assert_close(logits(student), logits(dense(model, [1] * 3)), rtol=0.02, atol=0.02)
    assert keep_experts(model, [[1]] * 3).config.num_experts_per_tok == 1


def test_layers_and_experts_are_counted_in_the_original():
    model = mixture()
    once = keep_experts(keep_layers(model, [0, 2]), [[0, 1, 3], [1, 2, 3]])
    twice = keep_layers(keep_experts(once, [[1, 2], [0, 2]]), [1])
    assert twice.config.pruned == {"layers": [2], "of": 3, "experts": [[1, 3]], "experts_of": 4}
    assert original_layers(twice.config, 3) == [2]
    other = keep_experts(keep_experts(model, [[0, 1, 3], [0, 1, 3], [1, 2, 3]]), [[1, 2], [1, 2], [0, 2]])
    last = keep_layers(other, [2])
    assert all(torch.equal(a, b) for a, b in zip(last.state_dict().values(), twice.state_dict().values(), strict=True))


@pytest.mark.parametrize("changes", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}])
def test_layers_that_are_dense_in_the_mixture(changes):
    model = mixture("qwen3_moe", **changes)
    layer = min(expert_blocks(model))
    student = keep_experts(keep_layers(model, [0, layer]), [[1, 3]])
    assert list(expert_blocks(student)) == [1]
    assert student.config.pruned["experts"] == [None, [1, 3]]
    with pytest.raises(ValueError, match="experts are 24 wide and its dense layers 48"):
        dense(model, [0] * len(expert_blocks(model)))
    assert dense(keep_layers(model, [layer]), [2]).config.intermediate_size == 24


@pytest.mark.parametrize(
    ("arch", "message"), [("llama", "LlamaForCausalLM has none"), ("olmoe", "OlmoeForCausalLM has no dense form")]
)
def test_refusals(arch, message):
    with pytest.raises(ValueError, match=message):
        dense(tiny_model(arch), [0, 0])


@pytest.mark.parametrize("student", ["dense", "experts"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_mixture_teaches_the_student_that_was_made_of_it(student, layout):
    """KD with the attention term, in bf16-mixed, a few steps: it gets nearer to its teacher."""
    teacher = mixture()
    small = keep_layers(teacher, [0, 2])
    small = dense(small, [1, 2]) if student == "dense" else keep_experts(small, [[0, 1], [1, 2]])
    options = {"optimizer": lambda p: torch.optim.AdamW(p, lr=2e-3), "lr_scheduler": None}
    options |= {"router_weight": 0.01} if student == "experts" else {}
    model = itk.KDModule(small, teacher, attention=AttentionLoss(), **options)
    assert model._distiller.layers == {"": {0: 0, 1: 2}}
    samples = ragged_samples(8)
    data = b.pack([samples[:4], samples[4:]], pad_id=0) if layout == "packed" else b.pad(samples, pad_id=0)
    before = model.losses(data)
    trainer = L.Trainer(**QUIET, max_steps=6, precision="bf16-mixed", enable_checkpointing=False)
    trainer.fit(model, torch.utils.data.DataLoader([data] * 6, batch_size=None))
    assert before["attention"].total > 0
    for name in ("kl", "attention"):
        assert model.losses(data)[name].total < 0.9 * before[name].total, name
    assert ("train/router" in trainer.callback_metrics) == (student == "experts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prune")
    mixture(max_position_embeddings=512).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:6]))
    return folder


def prune(folder, output, *more: str) -> list[str]:
    return ["prune", "--model", f"{folder}/model", "--output", str(output), "--device", "cpu", *more]


@pytest.mark.parametrize(("experts", "kind", "count"), [("2", "mixtral", 2), ("dense", "mistral", 1)])
def test_the_command(folder, tmp_path, capsys, experts, kind, count):
    data = ("--data", f"{folder}/data.jsonl", "--limit", "4")
    assert cli.main(prune(folder, tmp_path / "out", "--experts", experts, "--layers", "0,2", *data)) == 0
    assert f"2 of 3 layers, {count} of 4 experts with" in capsys.readouterr().out
    config, model = AutoConfig.from_pretrained(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert config.model_type == kind
    assert config.pruned["layers"] == [0, 2]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    whole = AutoModelForCausalLM.from_pretrained(folder / "model")
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder / "model"))
    records = [record.messages for record in islice(read(one_source(f"{folder}/data.jsonl", "data")), 4)]
    use = expert_use(whole, [conversation.input_ids for conversation in encoder.encode(records, 512)])
    assert config.pruned["experts"] == [sorted(use[layer].topk(count).indices.tolist()) for layer in (0, 2)]
    expected = keep_layers(whole, [0, 2])
    chosen = config.pruned["experts"]
    expected = dense(expected, [own for (own,) in chosen]) if count == 1 else keep_experts(expected, chosen)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ((), "nothing to prune"),
        (("--experts", "2"), "name some (data)"),
        (("--experts", "4", "--data", "DATA"), "below 4"),
        (("--experts", "most", "--data", "DATA"), "or dense, found 'most'"),
    ],
)
def test_the_command_refuses(folder, capsys, tmp_path, more, line):
    more = [f"{folder}/data.jsonl" if part == "DATA" else part for part in more]
    assert line in refused(capsys, *prune(folder, tmp_path / "new", *more))
    assert not (tmp_path / "new").exists()


def test_the_command_refuses_a_model_without_experts(folder, capsys, tmp_path, model_folder):
    args = ["--model", model_folder("llama"), "--experts", "2", "--data", f"{folder}/data.jsonl"]
    assert "LlamaForCausalLM has none" in refused(capsys, "prune", "--output", f"{tmp_path}/new", *args)


def test_a_mixture_trains_and_leaves_by_the_command_line(folder, tmp_path):
    fit = ["fit", "--model", "lightning_itk.SFTModule", "--model.student", f"{folder}/model", "--model.router_weight",
           "0.01", "--data.train", f"{folder}/data.jsonl", "--data.cache_dir", f"{tmp_path}/cache",
           "--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.default_root_dir",
           f"{tmp_path}/runs"]  # fmt: skip
    assert cli.main(fit) == 0
    (checkpoint,) = (tmp_path / "runs").rglob("*.ckpt")
    assert cli.main(["export", "--ckpt", str(checkpoint), "--output", f"{tmp_path}/out"]) == 0
    content = torch.load(checkpoint, weights_only=True)
    assert len(content["router_load"]) == 3
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert len(exported) > 10
    assert all(torch.equal(tensor, content["state_dict"][f"student.{name}"]) for name, tensor in exported.items())
