"""What the attention term's engine gets, under every precision that people train with."""

import lightning as L
import pytest
import torch
from tiny import QUIET, ragged_samples, tiny_model

import lightning_itk as itk
from lightning_itk import batch as b
from lightning_itk.attention import kl
from lightning_itk.methods.distillation import AttentionLoss

TAGS = ("reference", "expert")
DATA = b.pad(ragged_samples(6, teachers=2), pad_id=0, teachers=TAGS)


def distillation(method: str, dtype: torch.dtype = torch.float32, teacher: torch.dtype = torch.float32):
    """A module whose teachers hold their weights in a dtype of their own."""
    teachers = [tiny_model("llama", seed).to(teacher) for seed in (1, 2)]
    common = {"attention": AttentionLoss(), "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}
    student = tiny_model("llama", 0).to(dtype)
    if method == "kd":
        return itk.KDModule(student, teachers[0], **common)
    return itk.DAEModule(student, dict(zip(TAGS, teachers, strict=True)), **common)


@pytest.fixture
def engine(monkeypatch):
    """Dtypes of (q, k) of the student and the teacher at every call of the engine."""
    seen = set()
    own = kl.tiled_attention_kl

    def spy(student, teacher, *arguments, **options):
        seen.add((student.q.dtype, student.k.dtype, teacher.q.dtype, teacher.k.dtype))
        return own(student, teacher, *arguments, **options)

    monkeypatch.setattr(kl, "tiled_attention_kl", spy)
    return seen


@pytest.mark.parametrize("method", ["kd", "dae"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_the_engine_gets_the_precision_that_attention_runs_in(tmp_path, engine, method, precision):
    model = distillation(method)
    trainer = L.Trainer(
        **QUIET,
        max_steps=1,
        precision=precision,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    loader = torch.utils.data.DataLoader([DATA], batch_size=None)
    trainer.fit(model, loader, loader)
    assert engine == {(torch.float32 if precision == "32-true" else torch.bfloat16,) * 4}
    weights = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {parameter.dtype for parameter in model.student.parameters()} == {weights}


@pytest.mark.parametrize("method", ["kd", "dae"])
@pytest.mark.parametrize("teacher", [torch.float32, torch.bfloat16], ids=["fp32-teacher", "bf16-teacher"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_reaches_a_teacher_of_any_dtype(engine, method, teacher, dtype):
    """fp16-mixed as well, whose loss scaling needs a GPU: a step under its autocast."""
    model = distillation(method, teacher=teacher)
    with torch.autocast("cpu", dtype=dtype):
        terms = model.losses(DATA)
    total = torch.stack([term.total for name, term in terms.items() if name.startswith("attention")]).sum()
    total.backward()
    assert engine == {(dtype,) * 4}
    gradient = model.student.model.layers[0].self_attn.q_proj.weight.grad
    assert gradient.dtype == torch.float32
    assert gradient.norm() > 0


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.015), (torch.float16, 0.002)], ids=["bf16", "fp16"])
def test_the_error_is_that_of_a_forward_pass_in_that_precision(dtype, limit):
    """The attention term and its gradient by the projections, against fp64 and beside a whole model in that dtype."""
    results = []
    for weights, within in ((torch.float64, False), (torch.float32, True)):
        model = distillation("kd", weights, weights)
        with torch.autocast("cpu", dtype=dtype, enabled=within):
            total = model.losses(DATA)["attention"].total
        total.backward()
        projections = [p.grad for name, p in model.student.named_parameters() if "q_proj" in name or "k_proj" in name]
        results.append((total.detach().double(), torch.cat([g.flatten() for g in projections]).double()))
    for found, expected in zip(*results, strict=True):
        error = float((found - expected).norm() / expected.norm())
        print(dtype, error)
        assert error < limit
