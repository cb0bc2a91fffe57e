"""Two CPU ranks over gloo, in processes of their own, against one process with the whole batch."""

import functools
import json

import lightning as L
import pytest
import ranks
import runs
import torch
from exact import METHODS, batches, module
from processes import run_ranks
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.process


@functools.cache
def single(method: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Weights before and after, and metrics, of one process with the whole batch."""
    model = module(method)
    before = torch.cat([p.detach().flatten().clone() for p in model.student.parameters()])
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(batches(8), batch_size=None)
    trainer.fit(model, loader, loader)
    after = torch.cat([p.detach().flatten() for p in model.student.parameters()])
    return before, after, {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_take_the_same_steps(method, strategy, tmp_path):
    run_ranks(ranks.train, method, strategy, tmp_path)
    result = torch.load(tmp_path / "weights.pt", weights_only=True)
    before, after, metrics = single(method)
    weights = torch.cat([tensor.flatten() for tensor in result["weights"].values()])
    assert (weights - after).norm() / (after - before).norm() < 1e-5
    assert result["metrics"].keys() == metrics.keys()
    for name, value in metrics.items():
        if name.startswith(("val/", "train/")) and "padding" not in name:
            assert result["metrics"][name] == pytest.approx(value, rel=1e-4), name
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "last")
    for name, parameter in exported.named_parameters():
        torch.testing.assert_close(parameter.detach(), result["weights"][name])
    if strategy == "ddp":
        checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert all(name.startswith("student.") for name in checkpoint["state_dict"])
        assert len(checkpoint["rng_states"]) == 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_resume_in_the_middle_of_an_epoch(strategy, tmp_path):
    run_ranks(ranks.resume, runs.write_records(tmp_path), strategy, tmp_path)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert weights["resumed"].equal(weights["whole"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_rank_without_samples_takes_part(strategy, tmp_path):
    """41 samples in steps of 2 x 2: in the last step one rank has none, and no teacher has any for it."""
    records = [{"prompt": f"q{i}", "completion": "ab" * (1 + i % 9), "is_domain": i % 2} for i in range(41)]
    data = tmp_path / "records.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    ranks.odd_data(str(data), tmp_path)
    run_ranks(ranks.odd_data, str(data), tmp_path, strategy, 2, timeout=120)
    alone, together = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("auto", strategy))
    before = torch.cat([p.detach().flatten() for p in module("dae").student.parameters()])
    assert (together - alone).norm() / (alone - before).norm() < 1e-5
