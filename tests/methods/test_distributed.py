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
from tiny import QUIET, routed_model, tiny_model
from transformers import AutoModelForCausalLM

from lightning_itk import cli

pytestmark = pytest.mark.process


@functools.cache
def single(method: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Weights before and after, and metrics, of one process with the whole batch."""
    model = module(method)
    before = torch.cat([p.detach().flatten().clone() for p in model.student.parameters()])
    trainer = L.Trainer(
        **QUIET,
        max_epochs=2,
        enable_checkpointing=False,
    )
    loader = torch.utils.data.DataLoader(batches(8), batch_size=None)
    trainer.fit(model, loader, loader)
    after = torch.cat([p.detach().flatten() for p in model.student.parameters()])
    return before, after, {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", [*METHODS, "moe"])
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


TWO, ONE = {"ranks": 2, "rows": (2, 2)}, {"ranks": 1, "rows": (2, 4)}
SETUPS = {"alone": ONE, "wide": {"ranks": 1, "rows": (8, 1)}, "ddp": TWO, "fsdp2": TWO}


def fit(setup: str, data: str, folder, name: str, **options) -> torch.Tensor:
    """Final weights of 12 steps with the strategy, ranks and micro-batches of a set-up."""
    strategy = setup if setup in ("ddp", "fsdp2") else "auto"
    plan = SETUPS[setup]
    together = functools.partial(ranks.fit, strategy=strategy, **plan, **options)
    if plan["ranks"] == 1:
        together(data, folder, name)
    else:
        run_ranks(together, data, folder, name)
    result = torch.load(folder / f"{name}.pt", weights_only=True)
    assert result["step"] == 12
    return result["weights"]


def test_adapters_leave_a_sharded_run_as_merged_weights(tmp_path, model_folder):
    """By HFExport while all ranks are there, and by `export` from the checkpoint folder."""
    student = model_folder("llama")
    for strategy in ("ddp", "fsdp2"):
        run_ranks(ranks.adapters, student, strategy, tmp_path / strategy)
    merged = [tmp_path / "ddp" / "export" / "last", tmp_path / "fsdp2" / "export" / "last"]
    assert (tmp_path / "fsdp2" / "trained.ckpt").is_dir()
    assert cli.main(["export", "--ckpt", f"{tmp_path}/fsdp2/trained.ckpt", "--output", f"{tmp_path}/out"]) == 0
    before, *found = (dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
                      for folder in (student, *merged, tmp_path / "out"))  # fmt: skip
    for name, weight in found[1].items():
        off, moved = (found[0][name] - weight).norm(), (weight - before[name]).norm()
        assert off <= 0.05 * moved, name  # bf16 under DDP does not round alike
        torch.testing.assert_close(found[2][name], weight, rtol=1e-6, atol=1e-7)
        assert weight.dtype == torch.float32
    assert all((w != w.bfloat16()).any() for w in found[1].values() if w.ndim == 2)
    assert any((found[0][name] - weight).abs().max() > 1e-3 for name, weight in before.items())


def test_fsdp2_keeps_fp32_and_computes_in_half_precision(tmp_path):
    """Shards, optimizer and reduced gradients in fp32; weights travel, and layers multiply, in bf16."""
    ranks.half("auto", 1, "32-true", tmp_path)
    run_ranks(functools.partial(ranks.half, "fsdp2", 2, "bf16-mixed", tmp_path))
    exact, mixed = (torch.load(tmp_path / f"{name}.pt") for name in ("auto-32-true", "fsdp2-bf16-mixed"))
    assert mixed["seen"]["weight"] == "torch.bfloat16"
    assert mixed["seen"]["kept"] == "torch.float32"
    assert mixed["seen"]["state"] in ("torch.float32", "")
    moved, off = exact["after"] - exact["before"], mixed["after"] - exact["after"]
    assert off.norm() / moved.norm() < 0.05
    assert (mixed["after"] != mixed["after"].bfloat16()).float().mean() > 0.9


@pytest.mark.parametrize(("strategy", "method"), [("ddp", "sft"), ("fsdp2", "sft"), ("fsdp2", "kd")])
def test_two_ranks_resume_in_the_middle_of_an_epoch(strategy, method, tmp_path):
    data, how = runs.write_records(tmp_path), {"method": method, "dropout": 0.1, "rows_only": method == "kd"}
    whole = fit(strategy, data, tmp_path, "whole", **how)
    checkpoint = tmp_path / "whole" / "step=3.ckpt"
    resumed = fit(strategy, data, tmp_path, "resumed", ckpt=checkpoint, **how)
    assert resumed.equal(whole)


# 42 records in steps of 8 rows: 6 steps an epoch, of which the last has 2 rows.
@pytest.mark.parametrize("method", ["sft", "kd", "moe"])
def test_any_strategy_resumes_from_any_other(method, tmp_path):
    """In the middle of an epoch, at its end and in the next; KD has a tied teacher, which no checkpoint holds; a
    mixture goes on with the load of the step before."""
    data = runs.write_records(tmp_path)
    start = routed_model(0) if method == "moe" else tiny_model("llama", 0)
    before = torch.cat([p.detach().flatten() for p in start.parameters()])
    moves = [("fsdp2", "alone", 3), ("alone", "fsdp2", 3), ("fsdp2", "wide", 6), ("ddp", "fsdp2", 8)]
    moves = moves[:2] if method == "moe" else moves
    moves += [("fsdp2", "ddp", 11), ("ddp", "wide", 5)] if method == "sft" else []
    origins = {"alone", *(origin for origin, _, _ in moves)}
    whole = {setup: fit(setup, data, tmp_path, setup, method=method) for setup in origins}
    for number, (origin, setup, step) in enumerate(moves):
        checkpoint = tmp_path / origin / f"step={step}.ckpt"
        assert checkpoint.is_dir() == (origin == "fsdp2")
        result = fit(setup, data, tmp_path, f"resumed-{number}", method=method, ckpt=checkpoint)
        assert (result - whole["alone"]).norm() / (whole["alone"] - before[: len(result)]).norm() < 1e-5, checkpoint


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
