"""Two CPU ranks under FSDP2 that read their own rows of the weights, against the same ranks that read everything."""

import functools

import pytest
import sharded_runs
import torch
from processes import run_ranks

pytestmark = pytest.mark.process


@pytest.mark.parametrize("method", ["sft", "kd", "dae", "lora"])
def test_rows_train_like_whole_models(method, tmp_path, model_folder):
    """To the bit; students of a tied head too, teachers without gradients, adapters initialised alike."""
    student = model_folder("llama", tie_word_embeddings=method == "kd")
    teachers = (model_folder("llama", 1, num_hidden_layers=4), model_folder("qwen3", 2))
    run_ranks(functools.partial(sharded_runs.train, method, student, teachers, tmp_path))
    for rank in range(2):
        expected, found = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for name in ("whole", "rows"))
        assert found["losses"].equal(expected["losses"])
        assert found["hash"] == expected["hash"]
        assert found["sharded"]
        assert sum(found["sizes"]) <= sum(expected["sizes"])
        for kind in ("weights", "buffers"):
            assert found[kind].keys() == expected[kind].keys()
            for name, tensor in expected[kind].items():
                assert found[kind][name].equal(tensor), name
    files = [tmp_path / name / "last" / "model.safetensors" for name in ("whole", "rows")]
    assert files[0].read_bytes() == files[1].read_bytes()
