"""A student that learns from a teacher's folder learns what it learns from the teacher itself."""

import copy
import itertools

import pytest
import torch
from caching import WIDE, cache, data_module, write_data
from tiny import tiny_model
from waits import Waits, send

import lightning_itk as itk
from lightning_itk import batch as b
from lightning_itk.losses.topk import top_k, topk_kl_parts
from lightning_itk.methods.cached_teacher import CachedTeacher
from lightning_itk.methods.teacher import Teacher


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(path, tmp_path_factory):
    """A teacher of 4 layers with its states, and queries and keys of layers 1 and 3."""
    output = tmp_path_factory.mktemp("cached") / "teacher"
    cache(path, output, layers=(1, 3))
    return output


def batches(path: str, **options) -> list:
    data = data_module(path, **options)
    data.prepare_data()
    data.setup("fit")
    return [*data.train_dataloader(), *data.val_dataloader()]


def live() -> Teacher:
    return Teacher(tiny_model("llama", 1, **WIDE))


def step(module: itk.InstructionModule, batch) -> tuple[dict[str, float], torch.Tensor]:
    """The terms of a batch and the student's gradient."""
    module.zero_grad()
    terms = module.losses(batch)
    sum(term.weight * term.total for term in terms.values()).backward()
    gradient = torch.cat([p.grad.flatten() for p in module.student.parameters()])
    return {name: float(term.total.detach()) for name, term in terms.items()}, gradient


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("kind", "temperature"), [*itertools.product(["forward", "reverse", "jsd"], [1.0, 2.0])])
def test_states_are_the_live_teacher(path, folder, kind, temperature, packing):
    """Whatever the order and the layout: the folder was filled from padded batches, in order of length."""
    options = {"kind": kind, "temperature": temperature, "ce_weight": 0.3}
    modules = [itk.KDModule(tiny_model("llama", 0), teacher, **options) for teacher in (live(), str(folder))]
    for batch in batches(path, packing=packing, batch_size=2 + packing, seed=7):
        (terms, gradient), (cached, cached_gradient) = (step(module, batch) for module in modules)
        close(cached, terms)
        assert (cached_gradient - gradient).norm() <= 1e-6 * gradient.norm() + 1e-7
    figures, others = ({name: float(term.total) for name, term in module.evaluate(batch).items()} for module in modules)
    assert others == pytest.approx(figures, rel=1e-6)


def close(found: dict[str, float], expected: dict[str, float]) -> None:
    """To 1e-6 of the loss: another layout of a batch rounds differently."""
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6 * max(expected.values()))


def test_attention_from_stored_queries_and_keys(path, folder):
    """A teacher with twice the layers and heads, padded and packed; soft-cap and window come from the manifest."""
    attention = {"weight": 0.5, "layers": {0: 1, 1: 3}}
    modules = [itk.KDModule(tiny_model("llama", 0), teacher, attention=attention) for teacher in (live(), str(folder))]
    assert modules[0].attention_head_dim == modules[1].attention_head_dim
    for packing in (False, True):
        for batch in batches(path, packing=packing, seed=5):
            (terms, gradient), (cached, cached_gradient) = (step(module, batch) for module in modules)
            assert terms["attention"] > 0
            close(cached, terms)
            assert (cached_gradient - gradient).norm() <= 2e-6 * gradient.norm() + 1e-7
    with pytest.raises(
        ValueError, match=r"no queries and keys of teacher layers \[0, 2\], but those of layers \[1, 3\]"
    ):
        itk.KDModule(tiny_model("llama", 0), str(folder), attention={"layers": {0: 0, 1: 2}})


@pytest.mark.parametrize("arch", ["gemma2", "granite", "llama"])
def test_soft_cap_scale_and_bias_of_the_head(arch, path, tmp_path):
    """And the sliding windows of a model's layers."""
    model = tiny_model(arch, 1)
    if arch == "llama":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(300))
    teacher = Teacher(model)
    cache(path, tmp_path / "teacher", teacher=teacher, layers=(0, 1))
    options = {"temperature": 2.0, "attention": {"layers": "all"}}
    modules = [itk.KDModule(tiny_model(arch, 0), one, **options) for one in (teacher, str(tmp_path / "teacher"))]
    for batch in batches(path)[:2]:
        (terms, _), (cached, _) = (step(module, batch) for module in modules)
        close(cached, terms)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_bf16_teacher_loses_nothing(precision, path, tmp_path):
    """Its states are stored in bf16; with batches of one sample the live teacher rounds as the stored one did."""
    model = tiny_model("llama", 1, **WIDE).bfloat16()
    one = {"batch_size": 1}
    cache(path, tmp_path / "teacher", teacher=Teacher(model), precision=precision, data=one, layers=(1, 3))
    cached = CachedTeacher(str(tmp_path / "teacher"))
    assert cached.manifest.teacher["dtype"] == "bfloat16"
    options = {"attention": {"layers": {0: 1, 1: 3}}}
    modules = [itk.KDModule(tiny_model("llama", 0), teacher, **options) for teacher in (Teacher(model), cached)]
    for batch in batches(path, **one):
        with torch.autocast("cpu", torch.bfloat16, enabled="mixed" in precision):
            (terms, gradient), (others, cached_gradient) = (step(module, batch) for module in modules)
        assert others == terms
        assert cached_gradient.equal(gradient)


def test_top_k_is_the_live_teachers_top_k(path, tmp_path):
    """Rounded to 16 bits; what is said of the teacher itself is exact."""
    cache(path, tmp_path / "teacher", mode="topk", k=20, temperature=2.0)
    modules = [
        itk.KDModule(tiny_model("llama", 0), one, temperature=2.0) for one in (live(), str(tmp_path / "teacher"))
    ]
    for batch in batches(path, packing=True):
        run = modules[0].forward_pass(batch)
        target, rows = run.targets[""], run.student.states.flatten(0, 1)[run.rows.places]
        best = top_k(*target.answer, target.targets, 20, 2.0)
        expected = topk_kl_parts(rows, run.student.head, best, target.targets, modules[1]._how)
        assert float(modules[1].losses(batch)["kl"].total) == pytest.approx(float(expected.kl), rel=5e-3)
        figures, others = ({name: float(t.total) for name, t in m.evaluate(batch).items()} for m in modules)
        assert others == pytest.approx(figures, rel=1e-6)


def test_a_copy_maps_the_files_itself(folder, path):
    module = itk.KDModule(tiny_model("llama", 0), str(folder))
    batch = batches(path)[0]
    assert float(copy.deepcopy(module).losses(batch)["kl"].total) == float(module.losses(batch)["kl"].total)
    state = module.state_dict()
    assert all(name.startswith("student.") for name in state)
    module.load_state_dict(state, strict=True)


@pytest.mark.parametrize("mode", ["states", "topk"])
def test_a_micro_batch_waits_for_the_device_once(mode, path, folder, tmp_path):
    """And once more in the student, where transformers looks whether a batch is packed."""
    if mode == "topk":
        folder = tmp_path / "teacher"
        cache(path, folder, mode=mode, k=20)
    attention = {"layers": {0: 1, 1: 3}} if mode == "states" else None
    model = itk.KDModule(tiny_model("llama", 0), str(folder), attention=attention)
    for packing in (False, True):
        batch = batches(path, packing=packing)[0]
        model._loss_scale = 1.0  # found out once in a run
        expected = model.training_step(batch, 0).detach()
        send(model)
        with Waits() as waits:
            total = model.training_step(b.Batch(**send(dict(batch))), 0)
        of_transformers = sum(count for place, count in waits.places.items() if "transformers/" in place)
        assert of_transformers <= 1
        assert waits.places.total() - of_transformers <= 1, waits.places
        torch.testing.assert_close(total.detach().here, expected)
        model = itk.KDModule(tiny_model("llama", 0), str(folder), attention=attention)


def test_dae_with_a_live_and_a_cached_teacher(path, tmp_path):
    expert = Teacher(tiny_model("llama", 2, **WIDE))
    cache(path, tmp_path / "expert", teacher=expert, wanted=lambda tag: tag == "expert", layers=(1, 3))
    cached = CachedTeacher(str(tmp_path / "expert"))
    assert cached.manifest.samples == 9
    options = {"teacher_weights": {"expert": 2.0}, "attention": {"layers": {0: 1, 1: 3}}}
    pairs = [{"general": live(), "expert": teacher} for teacher in (expert, cached)]
    modules = [itk.DAEModule(tiny_model("llama", 0), pair, **options) for pair in pairs]
    for packing in (False, True):
        for batch in batches(path, packing=packing, batch_size=3):
            (terms, gradient), (others, cached_gradient) = (step(module, batch) for module in modules)
            close(others, terms)
            assert (cached_gradient - gradient).norm() <= 2e-6 * gradient.norm() + 1e-7
