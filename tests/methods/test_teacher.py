import pytest
import torch
from tiny import byte_tokenizer, ragged_samples, tiny_model

from lightning_itk import batch as b
from lightning_itk.methods.teacher import Teacher
from lightning_itk.models.hidden import hidden_states


def test_frozen_in_eval_mode_and_without_gradients(model_folder):
    teacher = Teacher(model_folder("llama", attention_dropout=0.5))
    parent = torch.nn.ModuleDict({"teacher": teacher}).train()
    assert not any(module.training for module in parent["teacher"].modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    batch = b.pad(ragged_samples(3), pad_id=0)
    answer = teacher(batch)
    assert not answer.states.requires_grad
    assert answer.states.equal(teacher(batch).states)
    assert answer.attention == {}


def test_stays_out_of_state_dicts_and_strict_loading_does_not_miss_it():
    class Parent(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.student = torch.nn.Linear(2, 2)
            self.teacher = Teacher(tiny_model("llama", seed))

    one, other = Parent(0), Parent(1)
    state = one.state_dict()
    assert set(state) == {"student.weight", "student.bias"}
    before = other.teacher.model.lm_head.weight.clone()
    other.load_state_dict(state, strict=True)
    assert other.student.weight.equal(one.student.weight)
    assert other.teacher.model.lm_head.weight.equal(before)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({"student.weight": one.student.weight}, strict=True)


def test_hands_out_queries_and_keys_of_watched_layers():
    teacher = Teacher(tiny_model("llama"))
    teacher.watch([1])
    batch = b.pad(ragged_samples(3), pad_id=0)
    answer = teacher(batch)
    assert set(answer.attention) == {1}
    assert answer.attention[1].q.shape[1] == 4
    assert answer.attention[1].k.shape[1] == 2
    assert answer.states.equal(hidden_states(tiny_model("llama"), batch).states)


def test_another_tokenizer_is_refused_with_the_first_differing_token(model_folder, tmp_path):
    teacher = Teacher(model_folder("llama"))
    teacher.check_tokenizer(byte_tokenizer())
    teacher.check_tokenizer(byte_tokenizer(extra=("<more>",)))  # a longer vocabulary is padding
    swapped = byte_tokenizer()
    text = swapped.backend_tokenizer.to_str().replace('"!":3', '"!":4').replace('"\\"":4', '"\\"":3')
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), eos_token="<|im_end|>")
    with pytest.raises(ValueError, match="different tokenizers: token 3 is '\"' in one and '!' in the other"):
        teacher.check_tokenizer(swapped)


def test_a_folder_with_missing_weights_is_an_error(model_folder, tmp_path):
    """Users have distilled from randomly initialised teachers."""
    from safetensors.torch import load_file, save_file

    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1 missing or mismatched weights \(first: model.layers.1.mlp.up_proj.weight\)"
    ):
        Teacher(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        Teacher(str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        Teacher(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype is no further argument for from_pretrained: it has an option"),
        ({"revison": "main"}, "cannot be loaded: .*unexpected keyword argument 'revison'"),
        ({"quantization_config": "4bit"}, "cannot be loaded: 'str' object has no attribute"),
        ({"gguf_file": 3}, "gguf_file is 3, expected a file's name"),
    ],
)
def test_arguments_of_from_pretrained_that_make_no_sense(kwargs, message, model_folder):
    with pytest.raises(ValueError, match=message):
        Teacher(model_folder("llama"), model_kwargs=kwargs)
