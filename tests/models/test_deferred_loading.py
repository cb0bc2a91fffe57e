"""Models whose weights come after the strategy, in one process: what is refused, and what is read whole and why."""

import lightning as L
import pytest
import torch
import transformers
from exact import batches
from safetensors.torch import load_file, save_file
from tiny import QUIET, tiny_model
from transformers import PreTrainedModel

from lightning_itk.methods.distillation import AttentionLoss
from lightning_itk.methods.kd import KDModule
from lightning_itk.methods.sft import SFTModule
from lightning_itk.models import sharded_loading
from lightning_itk.models.loading import LoRA, load_causal_lm
from lightning_itk.models.sharded_loading import deferred_loading, is_deferred


def fit(module) -> torch.Tensor:
    """The student's weights after a step for each of 4 batches."""
    trainer = L.Trainer(**QUIET, max_epochs=1, enable_checkpointing=False)
    trainer.fit(module, torch.utils.data.DataLoader(batches(8), batch_size=None))
    return torch.cat([p.detach().flatten() for p in module.student.parameters()])


@pytest.mark.parametrize("lora", [None, LoRA(r=2, modules_to_save=["lm_head", "layers.1"])])
def test_a_strategy_that_does_not_shard_reads_everything(lora, model_folder):
    found = []
    for later in (False, True):
        torch.manual_seed(0)
        module = SFTModule(model_folder("llama"), lora=lora, sharded_loading=later)
        assert "sharded_loading" not in module.hparams
        assert is_deferred(module.student) == later
        found.append(fit(module))
    assert found[0].equal(found[1])


def test_what_cannot_be_read_by_rows_says_why(tmp_path, model_folder, caplog, monkeypatch):
    llama = model_folder("llama")
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(load_causal_lm(llama), peft.LoraConfig(task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")

    def reason(name: str, **options) -> str:
        caplog.clear()
        with deferred_loading():
            model = load_causal_lm(str(name), **options)
        assert not any(p.is_meta for p in model.parameters())
        (line,) = [record.message for record in caplog.records if "read whole" in record.message]
        assert line.startswith(f"model {str(name)!r} is read whole by every rank: ")
        return line.partition(": ")[2]

    assert reason(tmp_path / "bin") == "its weights are not in safetensors files"
    assert reason(tmp_path / "adapter") == "it is an adapter"
    assert reason(llama, model_kwargs={"device_map": "cpu"}) == "device_map says where it goes"
    monkeypatch.setattr(sharded_loading, "_MERGES", {})
    assert reason(model_folder("mixtral")).startswith("transformers converts its weights (MergeModulelist, at model.")
    with monkeypatch.context() as older:
        older.delattr("transformers.core_model_loading.DtensorShardOperation")
        assert reason(llama) == f"transformers {transformers.__version__} is unknown"
    monkeypatch.setattr(PreTrainedModel, "is_custom_code", classmethod(lambda cls: True))
    assert reason(llama) == "its code comes with it"


def test_late_models_are_refused_as_others_are(tmp_path, model_folder):
    def changed(name: str, change) -> str:
        tiny_model("llama").save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
        return str(tmp_path / name)

    key = "model.layers.1.mlp.up_proj.weight"
    lacks = changed("lacks", lambda tensors: tensors.pop(key))
    longer = changed("longer", lambda tensors: tensors.update({key: torch.zeros(49, 32)}))
    for folder in (lacks, longer, str(tmp_path / "nowhere")):
        messages = []
        for later in (False, True):
            with pytest.raises(ValueError, match=r"missing or mismatched|cannot be loaded|does not exist") as error:
                SFTModule(folder, sharded_loading=later)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
        assert "\n" not in messages[0]
    broken = changed("broken", lambda tensors: tensors["lm_head.weight"].fill_(torch.nan))
    with pytest.raises(ValueError, match="LlamaForCausalLM does something to its logits"):
        fit(SFTModule(broken, sharded_loading=True))
    three = model_folder("llama", 1, num_attention_heads=3, num_key_value_heads=3, hidden_size=48)
    module = KDModule(model_folder("llama"), three, attention=AttentionLoss(), sharded_loading=True)
    with pytest.raises(ValueError, match="the student has 4 heads and teacher '' 3"):
        fit(module)
