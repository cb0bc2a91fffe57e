"""One optimizer step of a module that holds no numbers, on one of so many ranks that are not there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_itk.batch import IGNORE_INDEX, Batch, ResponseRows, Sample, pack, pad, response_rows
from lightning_itk.methods import distillation
from lightning_itk.methods import module as base
from lightning_itk.methods.cached_teacher import CachedTeacher
from lightning_itk.methods.dae import DAEModule
from lightning_itk.methods.distillation import DistillationModule
from lightning_itk.methods.module import InstructionModule
from lightning_itk.methods.step import weighted_sum
from lightning_itk.methods.teacher import Teacher
from lightning_itk.models.hidden import base_causal_lm, head_of
from lightning_itk.planning.losses import losses_of
from lightning_itk.planning.models import Depth, depths, read_config, shallow_model
from lightning_itk.planning.setting import Setting
from lightning_itk.planning.stand_ins import without_numbers
from lightning_itk.planning.tracker import Part, StepTracker


@dataclass
class Step:
    """What a rank's optimizer step takes: live bytes by moment and part, work, memory traffic; and the models.

    Attributes:
        weights: bytes of each model, whole, the student first.
        parameters: the same in numbers; `trained` of them of the student.
    """

    peaks: dict[str, dict[str, float]]
    flops: float
    traffic: float
    weights: list[float] = field(default_factory=list)
    parameters: list[float] = field(default_factory=list)
    trained: float = 0.0
    hidden: list[int] = field(default_factory=list)

    def grown(self, shallow: "Step", deeper: "Step", by: float) -> "Step":
        """This step and `by` times what one with deeper layers has more than a shallow one."""

        def mix(a: Any, b: Any, c: Any) -> Any:
            if isinstance(a, dict):
                return {key: mix(a[key], b[key], c[key]) for key in a if key in b and key in c}
            if isinstance(a, list):
                return [mix(*each) for each in zip(a, b, c, strict=True)]
            return a + by * (c - b)

        return Step(**{f.name: mix(*(getattr(s, f.name) for s in (self, shallow, deeper))) for f in fields(Step)})


def simulate(build: Callable[[], InstructionModule], setting: Setting, every: int = 1) -> Step:
    """The step at full depth, told by steps of shallow models: everything but the layers is as in the run, and memory
    at a moment, work and traffic are linear in the number of layers.

    Args:
        build: makes the module with its models by name, in the precision of its configuration and with impl: torch.
        every: layers come in groups of so many, beside what their own pattern says.

    Raises:
        ValueError: a model that cannot be run without numbers; one line.
    """
    try:
        planned: list[Depth] = []
        first = _run(build, setting, planned, None, every)
        total = first
        for number, depth in enumerate(planned):
            if depth.whole > depth.short:
                deeper = _run(build, setting, planned, number, every)
                total = total.grown(first, deeper, (depth.whole - depth.short) / (depth.longer - depth.short))
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise ValueError(f"this model cannot be run without numbers: its forward asks {error}") from error
    return total


def _run(
    build: Callable[[], InstructionModule], setting: Setting, planned: list[Depth], deeper: int | None, every: int
):
    """One simulated step; fills `planned` where it is empty. deeper: the number of the model that gets more layers."""
    calls = iter(range(1000))

    def load(name: str, **how: Any) -> Any:
        number = next(calls)
        if number == len(planned):
            config = read_config(name, how.get("trust_remote_code", False), how.get("model_kwargs"))
            cached = number > 0 and setting.cached_teacher
            planned.append(Depth(1, 1, 1) if cached else depths(config, every, teacher=number > 0))
        depth = planned[number]
        return shallow_model(name, depth.longer if number == deeper else depth.short, **how)

    batch = _batch(setting)
    rows = response_rows(batch)
    tracker = StepTracker()
    with _ranks(setting) as mesh, FakeTensorMode(allow_non_fake_inputs=True) as fake, without_numbers(setting, load):
        module = build()
        if setting.precision.endswith("-true") and not setting.precision.startswith("32"):
            module.to(setting.half)
        module._packing_checked = True
        whole = [list(model.parameters()) for model in module.models()]
        sizes = [[p.numel() for p in model] for model in whole]
        vocab = head_of(module.student).weight.shape[0]
        step = Step(
            {}, 0, 0,
            [float(sum(p.numel() * p.element_size() for p in model)) for model in whole],
            [float(sum(model)) for model in sizes],
            float(sum(p.numel() for p in whole[0] if p.requires_grad)),
            [base_causal_lm(model).config.get_text_config().hidden_size for model in module.models()],
        )  # fmt: skip
        del whole
        if setting.cached_teacher:
            module.models = lambda: [module.student]  # type: ignore[method-assign]
        if setting.strategy == "fsdp2":
            module._device_mesh = mesh
            module._trainer = cast(Any, SimpleNamespace(precision=setting.precision))
            module.configure_model()
        if isinstance(module, DAEModule):  # the largest teacher teaches all: as much as a batch can ask for
            batch["teachers"] = (_largest_teacher(module, planned),)
        with tracker, losses_of(setting, rows.places.numel(), vocab, tracker):
            _take_steps(module, _fake(batch, fake), _fake_rows(rows, fake), setting, tracker)
    step.peaks = {moment: dict(parts) for moment, parts in tracker.peaks.items()}
    step.flops, step.traffic = float(tracker.flops), float(tracker.traffic)
    return step


def _largest_teacher(module: DAEModule, planned: list[Depth]) -> str:
    """The teacher with the most parameters at full depth; one that is cached counts for nothing."""

    def size(name: str) -> int:
        teacher = module.teachers[name]
        if isinstance(teacher, CachedTeacher):
            return 0
        model = cast(Teacher, teacher).model
        layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        missing = depth_of[name].whole - len(layers)
        return _numel(model) + missing * _numel(layers[-1])

    live = [name for name, teacher in module.teachers.items() if not isinstance(teacher, CachedTeacher)]
    depth_of = dict(zip(live, planned[1:], strict=True))
    return max(module.teachers, key=size)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _take_steps(
    module: InstructionModule,
    batch: Batch,
    rows: ResponseRows,
    setting: Setting,
    tracker: StepTracker,
) -> None:
    """A step that has others before it: the optimizer's state is there."""
    student, *teachers = module.models()
    trained = [p for p in module.parameters() if p.requires_grad]
    tracker.mark([*student.parameters(), *student.buffers()], Part.WEIGHTS)
    for model in teachers:
        tracker.mark([*model.parameters(), *model.buffers()], Part.TEACHER)
        model.register_forward_pre_hook(lambda *_: setattr(tracker, "part", Part.TEACHER))
        model.register_forward_hook(lambda *_: setattr(tracker, "part", Part.ACTIVATIONS))
    for each in module.teachers.values() if isinstance(module, DistillationModule) else ():
        if isinstance(each, CachedTeacher):
            tracker.mark(each.parameters(), Part.TEACHER)
        elif setting.cached_teacher:
            tracker.mark([head_of(cast(Teacher, each).model).weight], Part.TEACHER)
    optimizer = module.optimizer(trained)
    for group in optimizer.param_groups:
        if setting.gpu and group.get("foreach", 0) is None and not group.get("fused"):
            group["foreach"] = True  # what torch chooses there
    with tracker.allocating(Part.OPTIMIZER):  # its state, as an earlier step made it
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    buckets = None
    if setting.strategy == "ddp":  # its reducer copies all gradients
        with tracker.allocating(Part.GRADIENTS):
            buckets = [torch.empty_like(p) for p in trained]
    layers = [m for m in student.modules() if isinstance(m, GradientCheckpointingLayer)]
    for number, layer in enumerate(layers):
        layer.register_forward_hook(_watch(tracker, trained, number, len(layers)))
    with (
        patch.object(base, "response_rows", lambda _: rows),
        patch.object(distillation, "response_rows", lambda _: rows),
    ):
        count = min(setting.accumulate, 2)
        for _ in range(count):
            _micro_batch(module, batch, setting, tracker, trained)
        tracker.flops = tracker.flops * setting.accumulate // count
        tracker.traffic = tracker.traffic * setting.accumulate // count
        tracker.moment = "optimizer"
        with tracker.allocating(Part.OPTIMIZER):
            optimizer.step()
        tracker.moment = ""
    del buckets


def _micro_batch(
    module: InstructionModule,
    batch: Batch,
    setting: Setting,
    tracker: StepTracker,
    trained: list[nn.Parameter],
) -> None:
    half = setting.precision.endswith("-mixed")
    with torch.autocast("cpu", dtype=setting.half, enabled=half):
        tracker.part, tracker.moment = Part.ACTIVATIONS, "forward"
        run = module.forward_pass(batch)
        tracker.moment = "loss"
        with tracker.allocating(Part.LOSS):
            total = weighted_sum(module.losses(run)) * 2.0**-10  # type: ignore[arg-type]
            del run
    tracker.moment, tracker.part = "backward, head", Part.LOSS
    total.backward()
    del total
    tracker.mark((p.grad for p in trained if p.grad is not None), Part.GRADIENTS)
    tracker.part, tracker.moment = Part.ACTIVATIONS, ""


def _watch(tracker: StepTracker, trained: list[nn.Parameter], number: int, count: int) -> Callable[..., None]:
    """A forward hook of a layer that tells when its backward pass begins."""
    moment = {count - 1: "backward, last layer", 0: "backward, first layer"}.get(number, "backward, between")

    def begins(gradient: Tensor) -> None:
        tracker.mark((p.grad for p in trained if p.grad is not None), Part.GRADIENTS)
        tracker.part, tracker.moment = Part.ACTIVATIONS, moment

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad and tracker.moment == "forward":
            states.register_hook(begins)

    return hook


@contextmanager
def _ranks(setting: Setting) -> Iterator[Any]:
    """A process group of so many ranks, of which this is the first and the others do not exist."""
    if setting.strategy != "fsdp2":
        yield None
        return
    dist.init_process_group("fake", rank=0, world_size=setting.ranks, store=FakeStore())
    try:
        names = ("data_parallel", "tensor_parallel")
        yield init_device_mesh("cpu", (setting.ranks, 1), mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def _batch(setting: Setting) -> Batch:
    """Rows as long as they may be; the end of each is learned."""
    ids = np.full(setting.length, 1)
    learned = np.arange(setting.length) >= round(setting.length * (1 - setting.response_share))
    labels = np.where(learned, ids, IGNORE_INDEX)
    samples = [Sample(ids, labels, number) for number in range(setting.rows)]
    return pack([[sample] for sample in samples], pad_id=0) if setting.packing else pad(samples, pad_id=0)


def _fake(batch: Batch, mode: FakeTensorMode) -> Batch:
    made = {key: mode.from_tensor(v) if isinstance(v, Tensor) else v for key, v in batch.items()}
    return Batch(**made)  # type: ignore[typeddict-item]


def _fake_rows(rows: ResponseRows, mode: FakeTensorMode) -> ResponseRows:
    return ResponseRows(mode.from_tensor(rows.places), mode.from_tensor(rows.targets), _fake(rows.host, mode))
