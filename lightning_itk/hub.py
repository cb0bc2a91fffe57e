"""What is read by folder or hub name: folders that must exist, tokenizers, what they differ in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from lightning_itk.gguf import DAMAGED, located, missing_package

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "tekken*")
_WHERE = ("revision", "subfolder", "token", "cache_dir", "local_files_only")


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, model_kwargs: Mapping[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained` with a one-line error, also for a model's folder without a tokenizer.

    Args:
        name: folder, hub name, or a `.gguf` file.
        trust_remote_code: run code that comes with it.
        model_kwargs: what the model was read with: the tokenizer is that of the same `gguf_file` and `revision`.

    Raises:
        ValueError: there is none, or it has no vocabulary.
    """
    where = _where(name, model_kwargs)
    if "gguf_file" not in where:
        where.pop("subfolder", None)  # of the weights; tokenizers stand beside it
    bare = not any(any(Path(name).expanduser().glob(pattern)) for pattern in _TOKENIZER_FILES)
    missing = f"folder {name!r} holds no tokenizer: save one there, or name another in data.tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, *DAMAGED) as error:
        if "gguf_file" in where:
            raise ValueError(f"no tokenizer can be read from {name!r}: {reason(error)}") from error
        if bare and Path(name).expanduser().is_dir():
            raise ValueError(missing) from error
        raise ValueError(f"no tokenizer can be loaded from {name!r}: {reason(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # GPT-2's is then made without a vocabulary
        raise ValueError(missing if bare else f"the tokenizer of {name!r} has no vocabulary")
    return tokenizer


def load_config(
    name: str, *, trust_remote_code: bool = False, model_kwargs: Mapping[str, Any] | None = None
) -> PreTrainedConfig:
    """The configuration of a model that would be read so. Raises ValueError, in one line."""
    try:
        return AutoConfig.from_pretrained(**_where(name, model_kwargs), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, *DAMAGED) as error:
        raise ValueError(f"no configuration can be read from {name!r}: {reason(error)}") from error


def _where(name: str, model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` that say which files are read."""
    check_folder(name)
    given = model_kwargs or {}
    return {**located(name, given.get("gguf_file")), **{key: given[key] for key in _WHERE if key in given}}


def first_difference(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """How two tokenizers differ, at the first token id where they do; None when they agree on every common token.

    A longer padded vocabulary is not a difference: only ids that carry a token in both are compared, and one
    tokenizer's tokens must be a prefix of the other's.
    """
    names = [{index: token for token, index in t.get_vocab().items()} for t in (a, b)]
    for index in sorted(names[0].keys() & names[1].keys()):
        if names[0][index] != names[1][index]:
            return f"token {index} is {names[0][index]!r} in one and {names[1][index]!r} in the other"
    for mine, other in (names, names[::-1]):
        extra = sorted(mine.keys() - other.keys())
        if extra and extra[0] < max(other):
            return f"token {extra[0]} ({mine[extra[0]]!r}) exists in only one of them"
    probe = "Hello, wörld!  1234\n\tdef f(x): return x"
    ids = [t(probe, add_special_tokens=False)["input_ids"] for t in (a, b)]
    if ids[0] != ids[1]:
        return f"they share a vocabulary but split {probe!r} into {ids[0][:8]}… and {ids[1][:8]}…"
    return None


def check_folder(name: str) -> None:
    """Refuse what looks like a folder and does not exist, before it is taken for a hub name."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    is_file = name.endswith(".gguf") and (looks_local or "/" not in name)
    if (looks_local or is_file) and not Path(name).expanduser().exists():
        raise ValueError(f"{'file' if is_file else 'folder'} {name!r} does not exist")


def reason(error: Exception) -> str:
    """Why something cannot be loaded, in a line: the package to install, or what the error says."""
    return missing_package(error) or first_line(error)


def first_line(error: Exception) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
