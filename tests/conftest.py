import os
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, tiny_model

torch.set_num_threads(1)  # the models are tiny; threads only fight over the cores


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """`model_folder(arch, seed, **config)` -> path of a saved tiny model with the byte-level tokenizer."""
    made: dict[tuple, str] = {}

    def make(arch: str = "llama", seed: int = 0, **changes) -> str:
        key = (arch, seed, *sorted(changes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{arch}-{seed}-")
            tiny_model(arch, seed, **changes).save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            made[key] = str(folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real data sets; skips where there is none."""
    folder = Path(os.environ.get("ITK_REAL_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set ITK_REAL_DATA")
    return folder
