"""Two CPU ranks under FSDP2 that read their own rows of the weights, against the same ranks that read everything."""

import functools
import json

import pytest
import sharded_runs
import torch
from processes import run_ranks
from tiny import EXTRA, tiny_model

pytestmark = pytest.mark.process


@pytest.mark.parametrize("method", ["sft", "kd", "dae", "lora"])
def test_rows_train_like_whole_models(method, tmp_path, model_folder):
    """To the bit; students of a tied head too, of experts, which leave as they came, teachers without gradients,
    adapters initialised alike."""
    student = model_folder("mixtral" if method == "sft" else "llama", tie_word_embeddings=method == "kd")
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


def test_every_kind_of_checkpoint_is_read_by_rows(tmp_path, model_folder):
    """Every architecture of the tests, several files, other dtypes, rows that no number of ranks divides, experts that
    transformers merges while it reads (one of them alone too, which it could not), base models under a tied head."""
    cases = [(model_folder(arch), "auto") for arch in EXTRA]
    cases += [(model_folder("llama", vocab_size=301, intermediate_size=47), "bfloat16")]
    cases += [(model_folder("mixtral", num_local_experts=experts), "float32") for experts in (3, 1)]
    model = tiny_model("llama", 5, tie_word_embeddings=True)
    for name, saved, options in (
        ("files", model, {"max_shard_size": "20KB"}),
        ("half", tiny_model("gemma2", 6).bfloat16(), {}),
        ("base", model.model, {}),
    ):
        saved.save_pretrained(tmp_path / name, **options)
        cases += [(str(tmp_path / name), "float32"), (str(tmp_path / name), "auto")]
    assert len(list((tmp_path / "files").glob("*.safetensors"))) > 2
    run_ranks(sharded_runs.read, cases, tmp_path)
    for rank in range(2):
        wrong = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(wrong) == len(cases)
        assert not {label: what for label, what in wrong.items() if what}


def test_no_rank_fails_alone(tmp_path, model_folder):
    run_ranks(sharded_runs.fail_alone, model_folder("llama"), tmp_path)
    messages = {(tmp_path / str(rank)).read_text() for rank in range(2)}
    assert messages == {f"model {model_folder('llama')!r} cannot be loaded: the disk is gone"}
