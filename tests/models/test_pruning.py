"""A student of some of a model's layers: which stay, what is in it, and whom it answers to."""

import json

import numpy as np
import pytest
import torch
from commands import RECORDS, refused
from tiny import byte_tokenizer, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_itk import cli
from lightning_itk.attention.capture import layer_map
from lightning_itk.methods.attention_maps import AttentionLoss
from lightning_itk.methods.kd import KDModule
from lightning_itk.models.pruning import block_influence, decoder_layers, keep_layers, layers_to_keep, original_layers

IDS = torch.arange(3, 15)[None]


def states(model) -> tuple[torch.Tensor, ...]:
    """Input of the first layer and output of every layer [layers + 1], before the final norm."""
    found = []
    _, layers = decoder_layers(model)
    handles = [
        layers[0].register_forward_pre_hook(
            lambda _, a, k: found.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
    ]
    handles += [
        layer.register_forward_hook(lambda _, a, out: found.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    with torch.no_grad():
        model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return tuple(found)


@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        ("2", [1, 3]),
        ("every:2", [1, 3, 5]),
        ("every:3", [2, 5]),
        ("0,1,5", [0, 1, 5]),
        ("-1, 0", [0, 5]),
        ("4,", [4]),
    ],
)
def test_what_layers_says(layers, kept):
    assert layers_to_keep(layers, 6, lambda: [0.1, 0.9, 0.1, 0.5, 0.4, 0.2]) == kept


def test_equal_influence_keeps_the_earlier_layer():
    assert layers_to_keep("2", 4, lambda: [0.5] * 4) == [0, 1]


@pytest.mark.parametrize(
    "layers", ["6", "0", "7", "every:1", "every:7", "every:x", "some", "0,6", "-7", "1,1", "1,-5", ""]
)
def test_what_layers_cannot_say(layers):
    with pytest.raises(ValueError, match="layers"):
        layers_to_keep(layers, 6, lambda: [1.0] * 6)


def test_influence_is_shortgpts():
    model = tiny_model("llama", num_hidden_layers=4).double()
    flow = states(model)
    expected = [
        float(1 - ((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean())
        for a, b in zip(flow, flow[1:], strict=False)
    ]
    found = block_influence(model, [IDS[0].numpy()])
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    # A mean over tokens, not over records.
    parts = [block_influence(model, [IDS[0, :n].numpy()]) for n in (3, 12)]
    both = block_influence(model, [IDS[0, :3].numpy(), IDS[0].numpy()])
    np.testing.assert_allclose(both, [(3 * a + 12 * b) / 15 for a, b in zip(*parts, strict=True)], rtol=1e-9)


@pytest.mark.parametrize(
    "arch", ["llama", "qwen3", "gemma2", "gemma3_text", "mixtral", "opt", "gpt2", "gpt_neox", "phi3"]
)
def test_a_student_is_its_layers(arch):
    model = tiny_model(arch, num_hidden_layers=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    kept = [0, 2, 3]
    student = keep_layers(model, kept)
    assert student.config.num_hidden_layers == 3
    kinds = getattr(model.config, "layer_types", None)
    assert getattr(student.config, "layer_types", None) == (kinds and [kinds[layer] for layer in kept])
    _, layers = decoder_layers(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    skipped = tiny_model(arch, num_hidden_layers=4)
    skipped.load_state_dict(model.state_dict())
    decoder_layers(skipped)[1][1].forward = lambda hidden, *args, **kwargs: hidden  # the layer that went
    with torch.no_grad():
        torch.testing.assert_close(student(IDS, use_cache=False).logits, skipped(IDS, use_cache=False).logits)
        for parameter in student.parameters():
            parameter.zero_()
    assert len(layers) == 4
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())  # copies


def test_precision_and_ties_stay():
    model = tiny_model("llama", num_hidden_layers=3, tie_word_embeddings=True).bfloat16()
    student = keep_layers(model, [0, 2])
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student.lm_head.weight is student.get_input_embeddings().weight


def test_pruned_twice_counts_from_the_original():
    twice = keep_layers(keep_layers(tiny_model("llama", num_hidden_layers=5), [0, 2, 3, 4]), [1, 3])
    assert original_layers(twice.config, 5) == [2, 4]
    assert original_layers(twice.config, 4) is None
    assert original_layers(tiny_model().config, 2) is None


def test_attention_pairs_each_layer_with_its_original(tmp_path):
    teacher = tiny_model("llama", num_hidden_layers=5)
    keep_layers(teacher, [0, 1, 4]).save_pretrained(tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    for layers, pairs in (("all", {0: 0, 1: 1, 2: 4}), ([1], {1: 1}), ({1: 3}, {1: 3})):
        module = KDModule(student, teacher, attention=AttentionLoss(layers=layers))
        module.configure_model()
        assert list(module._distiller.layers.values()) == [pairs], layers
    other = KDModule(student, tiny_model("llama", num_hidden_layers=6), attention=AttentionLoss())
    other.configure_model()
    assert list(other._distiller.layers.values()) == [layer_map(3, 6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prune")
    model = tiny_model("llama", num_hidden_layers=4, max_position_embeddings=512)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:6]))
    return folder


def prune(folder, *more: str) -> list[str]:
    return ["prune", "--model", f"{folder}/model", "--output", f"{folder}/out", "--device", "cpu", *more]


def test_the_command_makes_a_folder_that_trains(folder, capsys):
    assert cli.main(prune(folder, "--layers", "2", "--data", f"{folder}/data.jsonl", "--limit", "4")) == 0
    said = capsys.readouterr().out
    assert "2 of 4 layers" in said
    config = AutoConfig.from_pretrained(folder / "out")
    assert config.num_hidden_layers == 2
    assert config.pruned["of"] == 4
    again = prune(folder, "--layers", "every:2")
    assert "exists already" in refused(capsys, *again)
    assert cli.main([*again, "--overwrite", "true"]) == 0
    assert AutoConfig.from_pretrained(folder / "out").pruned == {"layers": [1, 3], "of": 4}
    fit = ["fit", "--model", "lightning_itk.SFTModule", "--model.student", f"{folder}/out", "--data.train",
           f"{folder}/data.jsonl",
           "--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--trainer.default_root_dir",
           f"{folder}/runs"]  # fmt: skip
    assert cli.main(fit) == 0


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--layers", "2"), "name some (data)"),
        (("--layers", "0,1,2,3"), "keeps all 4 layers"),
        (("--layers", "9", "--data", "DATA"), "below 4"),
        (("--layers", "1", "--data", "missing.jsonl"), "missing.jsonl"),
        (("--layers", "1", "--data", "DATA", "--limit", "0"), "at least 1"),
    ],
)
def test_the_command_refuses(folder, capsys, tmp_path, more, line):
    more = [f"{folder}/data.jsonl" if part == "DATA" else part for part in more]
    assert line in refused(capsys, *prune(folder, *more)[:3], "--output", f"{tmp_path}/new", *more)
    assert not (tmp_path / "new").exists()
