"""Models in GGUF files: what `from_pretrained` is asked for, and a plain model of what it gives."""

import re
import struct
from pathlib import Path
from typing import Any

# What `from_pretrained` trips over in damaged files and strange arguments, beside its own errors.
DAMAGED = (struct.error, IndexError, TypeError, NotImplementedError, AssertionError, AttributeError)
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def located(name: str, gguf_file: str | None = None) -> dict[str, str]:
    """What `from_pretrained` is given for a folder, a hub name, a `.gguf` file, or a folder with one and no config.

    Args:
        name: folder, hub name, or path of a `.gguf` file.
        gguf_file: the file's name in that folder or hub repository; None = as `name` says.

    Returns:
        `pretrained_model_name_or_path`, and `gguf_file` where one is to be read.

    Raises:
        ValueError: no such file, one of several parts, or a folder that holds more than one; names them.
    """
    if gguf_file is not None and not isinstance(gguf_file, str):
        raise ValueError(f"gguf_file is {gguf_file!r}, expected a file's name")
    path, folder = Path(name).expanduser(), name
    if gguf_file is None and path.suffix == ".gguf" and path.is_file():
        folder, gguf_file = str(path.parent), path.name
    elif gguf_file is None and path.is_dir() and not (path / "config.json").exists():
        found = sorted(file.name for file in path.glob("*.gguf"))
        if len(found) > 1:
            shown = ", ".join(found[:5]) + (", …" if len(found) > 5 else "")
            raise ValueError(f"folder {name!r} holds {len(found)} GGUF files ({shown}): name one by its path")
        gguf_file = found[0] if found else None
    elif gguf_file is not None and path.is_file():
        raise ValueError(f"gguf_file {gguf_file!r} is looked for in a folder or hub repository, {name!r} is a file")
    elif gguf_file is not None and path.is_dir() and not (path / gguf_file).is_file():
        raise ValueError(f"folder {name!r} holds no {gguf_file!r}")
    if gguf_file is None:
        return {"pretrained_model_name_or_path": name}
    if _PART.search(gguf_file):
        raise ValueError(f"{name!r}: {gguf_file} is one of several parts; merge them (llama-gguf-split --merge)")
    return {"pretrained_model_name_or_path": folder, "gguf_file": gguf_file}


def whole_weights() -> dict[str, Any]:
    """What else `from_pretrained` is given, so that weights are trainable numbers, and no blocks, where it has kernels
    for these."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)  # older versions know nothing but whole weights
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def make_plain(model: Any, name: str) -> None:
    """Take the marks of a quantised model off one whose weights are whole: it trains and is saved like any other.

    Args:
        model: a `PreTrainedModel` that was read from a GGUF file.
        name: what it was read from; its configuration names the folder only.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    model.config.name_or_path = name


def missing_package(error: BaseException) -> str | None:
    """What to install where a GGUF file cannot be read for want of a package; None for any other error."""
    text = str(error).lower()
    wanted = ("gguf>=" in text and "install" in text) or "accelerate is required" in text
    return "GGUF files need the `gguf` extra: pip install 'lightning-itk[gguf]'" if wanted else None
