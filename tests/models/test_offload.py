"""A teacher whose layers wait in host memory: the same answers to the bit, and never more than two layers elsewhere."""

import weakref

import pytest
import ranks
import torch
from exact import batches
from processes import run_ranks
from tiny import ragged_samples, tiny_model
from waits import NAME, Away, Waits, send

import lightning_itk as itk
from lightning_itk import batch as b
from lightning_itk.methods.teacher import Teacher
from lightning_itk.models import offload

DEEP = {"num_hidden_layers": 4, "intermediate_size": 40}


def away(module: torch.nn.Module, *models: torch.nn.Module) -> None:
    """All of a module to the device, but the layers of these models, as `Module.to` would do it."""
    stay = [(store, name, store[name]) for model in models for place in stream(model)._places for store, name in place]
    send(module)
    for store, name, tensor in stay:
        store[name] = tensor


def stream(model: torch.nn.Module) -> offload.LayerStream:
    return getattr(model, offload._MARK)


class Resident:
    """How many layers of shape `DEEP` have copies on the device while each layer runs, and when a model is done."""

    def __init__(self, monkeypatch, model: torch.nn.Module) -> None:
        self.alive: weakref.WeakSet = weakref.WeakSet()
        self.counts: list[int] = []
        make = Away.__new__

        def new(cls, here):
            made = make(cls, here)
            self.alive.add(made)
            return made

        monkeypatch.setattr(Away, "__new__", staticmethod(new))
        for layer in stream(model).layers:
            layer.register_forward_pre_hook(lambda *_: self.counts.append(self.now()))

    def now(self) -> int:
        shape = (DEEP["intermediate_size"], 32)  # of two matrices of every layer
        return len({t.here.data_ptr() for t in list(self.alive) if t.shape == shape}) // 2


class Stand(offload._Copies):
    """Streams of a device that has none: whatever is copied ahead is there before the running layer computes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, "a stream"

    def copy(self, source, target) -> None:
        for here, there in zip(source, target, strict=True):
            there.copy_(here, non_blocking=True)

    def arrived(self) -> None:
        pass


@pytest.mark.parametrize("ahead", [False, True], ids=["one", "one and the next"])
def test_the_device_sees_a_layer_at_a_time(monkeypatch, ahead):
    batch = b.pad(ragged_samples(3), pad_id=0)
    plain, teacher = Teacher(tiny_model("llama", **DEEP)), Teacher(tiny_model("llama", **DEEP), offload=True)
    for each in (plain, teacher):
        each.watch([1, 3])
    assert teacher(batch).states.equal(plain(batch).states)  # in host memory nothing is copied
    send(plain)
    with Waits():
        expected = plain(b.Batch(**send(dict(batch))))
    if ahead:
        monkeypatch.setattr(offload, "_Copies", Stand)
        monkeypatch.setattr(offload.LayerStream, "_pin", lambda *_: None)
    away(teacher, teacher.model)
    resident = Resident(monkeypatch, teacher.model)
    for _ in range(2):
        with Waits() as waits:
            found = teacher(b.Batch(**send(dict(batch))))
        assert found.states.here.equal(expected.states.here)
        for layer, attention in expected.attention.items():
            assert found.attention[layer].q.here.equal(attention.q.here)
            assert found.attention[layer].k.here.equal(attention.k.here)
        assert not any("offload" in place for place in waits.places), waits.places
    assert resident.counts == ([2] if ahead else [1]) * 8
    assert resident.now() == 0
    assert all(not isinstance(p, Away) for layer in stream(teacher.model).layers for p in layer.parameters())


def test_a_layer_that_fails_goes_home():
    teacher = Teacher(tiny_model("llama", **DEEP), offload=True)
    batch = b.pad(ragged_samples(3), pad_id=0)
    away(teacher, teacher.model)
    with Waits():
        expected = teacher(b.Batch(**send(dict(batch)))).states.here
    handle = teacher.model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with Waits(), pytest.raises(ZeroDivisionError):
        teacher(b.Batch(**send(dict(batch))))
    handle.remove()
    assert not any(isinstance(p, Away) for p in teacher.model.model.layers.parameters())
    with Waits():
        assert teacher(b.Batch(**send(dict(batch)))).states.here.equal(expected)


@pytest.mark.parametrize("method", ["kd", "dae"])
def test_training_sees_no_difference(method, monkeypatch):
    """With the attention term, and a student that recomputes its layers in backward."""
    batch, options = batches(8)[1], {"attention": itk.AttentionLoss(), "gradient_checkpointing": True}
    monkeypatch.setattr(torch, NAME, torch.cpu, raising=False)  # checkpointing asks for the device's module
    found = []
    for offloaded in (False, True):
        teachers = {"reference": tiny_model("llama", 1, **DEEP), "expert": tiny_model("llama", 2, **DEEP)}
        if method == "kd":
            model = itk.KDModule(tiny_model(), teachers["expert"], teacher_offload=offloaded, **options)
        else:
            model = itk.DAEModule(tiny_model(), teachers, teacher_offload=offloaded, **options)
        model._loss_scale = 1.0
        away(model, *([teacher.model for teacher in model.teachers.values()] if offloaded else []))
        with Waits():
            total = model.training_step(b.keep_host_copy(b.Batch(**send(dict(batch))), batch), 0)
            found.append([total, *torch.autograd.grad(total, list(model.student.parameters()))])
    assert all(one.here.equal(other.here) for one, other in zip(*found, strict=True))


def test_the_trainer_moves_everything_but_the_layers():
    model = itk.KDModule(tiny_model(), tiny_model("llama", 1, **DEEP), teacher_offload=True)
    layers = model.teacher.model.model.layers
    before = [parameter.clone() for parameter in layers.parameters()]
    model.to("meta")
    assert {p.device.type for p in layers.parameters()} == {"cpu"}
    assert all(p.equal(old) for p, old in zip(layers.parameters(), before, strict=True))
    assert {p.device.type for p in model.student.parameters()} == {"meta"}
    assert model.teacher.model.lm_head.weight.device.type == "meta"
    model.to(torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layers.parameters()} == {("cpu", torch.bfloat16)}
    assert all(name.startswith("student.") for name in model.state_dict())


def test_ddp_leaves_the_layers_alone():
    """It refuses modules with weights on two kinds of devices."""
    model = itk.KDModule(tiny_model(), tiny_model("llama", 1, **DEEP), teacher_offload=True)
    alone = set(model._ddp_params_and_buffers_to_ignore)
    layers = {id(p) for p in model.teacher.model.model.layers.parameters()}
    assert {name for name, p in model.named_parameters() if id(p) in layers} == alone
    assert len(alone) == len(layers)
    assert not itk.KDModule(tiny_model(), tiny_model())._ddp_params_and_buffers_to_ignore


def test_what_cannot_be_offloaded(tmp_path, model_folder):
    model = tiny_model()
    model.is_quantized = True
    with pytest.raises(ValueError, match="LlamaForCausalLM: quantised weights cannot be offloaded"):
        Teacher(model, offload=True)
    spread = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu",
              "model.rotary_emb": "cpu"}  # fmt: skip
    kwargs = {"device_map": spread, "offload_folder": str(tmp_path)}
    with pytest.raises(ValueError, match="device_map spreads it over cpu, disk, but .* set teacher_offload: true"):
        Teacher(model_folder("llama"), model_kwargs=kwargs)


@pytest.mark.process
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_see_no_difference(strategy, tmp_path):
    """Under FSDP2 the shards of the layers wait in host memory, by torch's own policy."""
    run_ranks(ranks.offloaded, strategy, tmp_path)
    plain, offloaded = torch.load(tmp_path / "weights.pt")
    assert offloaded.equal(plain)
