"""Chat templates as models bring them, and tokenizers of the kinds that there are, made in memory."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lightning_itk.data.chat import Encoded

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED_SHORT = CHATML_MARKED.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}", "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}"
)
CHATML_MARKED_LONG = CHATML_MARKED.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}", "{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
)
CHATML_NO_PROMPT_FLAG = CHATML.split("{% if add")[0]
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LLAMA2 = MISTRAL.replace("{{ ' ' + m['content'] + eos_token }}", "{{ ' ' + m['content'] | trim + ' ' + eos_token }}")
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
QWEN3 = (  # drops the thinking of turns before the last question and writes an empty block into the last answer
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% set content = m['content'] %}{% set thought = '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# name: (template, stop token, does the template trim contents, what it writes before an answer that is learned)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>", False, ""),
    "chatml marked": (CHATML_MARKED, "<|im_end|>", False, ""),
    "chatml marked without stop": (CHATML_MARKED_SHORT, "<|im_end|>", False, ""),
    "chatml marked with line break": (CHATML_MARKED_LONG, "<|im_end|>", False, ""),
    "chatml without generation prompt": (CHATML_NO_PROMPT_FLAG, "<|im_end|>", False, ""),
    "llama 3": (LLAMA3, "<|eot_id|>", True, ""),
    "mistral": (MISTRAL, "</s>", False, " "),
    "llama 2": (LLAMA2, " </s>", True, " "),
    "gemma": (GEMMA, "<end_of_turn>", True, ""),
    "zephyr": (ZEPHYR, "</s>", False, ""),
    "alpaca": (None, "</s>", False, ""),
}
SPECIALS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIALS += ["<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
TEXTS = [
    "the answer is four, as everybody knows",
    " is it so?\n\nYes: it is. ",
    "größe 東京 is <tag> 12345",
    "Below the line",
]


def make_tokenizer(template: str | None = None, kind: str = "bytes", bos: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(byte_fallback=kind == "sentencepiece", unk_token=None))
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
        backend.decoder = decoders.ByteLevel()
        alphabet, extra = pre_tokenizers.ByteLevel.alphabet(), []
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet, extra = list("abcdefghijklmnopqrstuvwxyz"), [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIALS + extra, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS * 5, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIALS[3:]
    )
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def learned_texts(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> list[str]:
    """What each span adds to the decoded text (decoding a span alone would lose a leading space)."""
    ids = encoded.input_ids
    return [tokenizer.decode(ids[:end])[len(tokenizer.decode(ids[:start])) :] for start, end in encoded.spans]


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """Its own vocabulary holds the names of the special tokens, as a SentencePiece model's does."""
    words = [*SPECIALS, "▁", *map(chr, range(33, 127)), *"é😀\n"]
    backend = Tokenizer(models.Unigram([(word, 0.0 if word in SPECIALS else -5.0) for word in words], 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    return special(backend)


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """It folds case before it looks for its special tokens."""
    vocabulary = {name: number for number, name in enumerate([*SPECIALS, *map(chr, range(33, 127))])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<pad>", continuing_subword_prefix=""))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=True) for name in SPECIALS])
    return special(backend)


def special(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(SPECIALS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIALS[3:]
    )
    tokenizer.chat_template = CHATML
    return tokenizer
