"""Tiny models and a byte-level tokenizer, made in memory and saved by path, so that the real loading code runs."""

import numpy as np
import torch

from lightning_itk.batch import IGNORE_INDEX, Sample

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
"""What a Trainer of these tests is told unless a test is about it."""

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 300,
}
EXTRA = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "phi3": {"pad_token_id": 0},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_positions": 128},
    "cohere": {"logit_scale": 0.25},
}


def tiny_model(arch: str = "llama", seed: int = 0, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(arch, **{**SIZES, **EXTRA[arch], **changes})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(10)  # attention maps that are far from uniform
    return model


def routed_model(seed: int = 0, arch: str = "mixtral", **changes):
    """A mixture of experts whose routers have opinions."""
    model = tiny_model(arch, seed, **changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate.weight" in name:
                weight.mul_(20)
    return model


def byte_tokenizer(extra: tuple[str, ...] = ()):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<|im_start|>", "<|im_end|>", *alphabet, *extra]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast


def ragged_samples(count: int = 16, vocab: int = 300, seed: int = 0, teachers: int = 1) -> list[Sample]:
    """Samples of very different lengths, with prompts; every third one belongs to the last teacher."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        length = int(rng.integers(4, 28))
        prompt = int(rng.integers(1, length - 1))
        ids = rng.integers(3, vocab, length)
        labels = np.where(np.arange(length) < prompt, IGNORE_INDEX, ids)
        samples.append(Sample(ids, labels, i, teachers - 1 if i % 3 == 0 else 0))
    return samples


def reward_model(folder, template: bool = True, labels: int = 1, arch: str = "llama") -> str:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(arch, **SIZES, **EXTRA.get(arch, {}), num_labels=labels, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)
