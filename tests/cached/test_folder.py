"""The folder of a cached teacher: killed and resumed, by any number of ranks, refused where it does not belong."""

import shutil

import pytest
import torch
from caching import WIDE, cache, data_module, hashes, trainer, write_data
from processes import run, run_ranks
from safetensors.torch import load_file, save_file
from tiny import ragged_samples, tiny_model
from torch.distributed.tensor import DTensor

import lightning_itk as itk
from lightning_itk import batch as b
from lightning_itk.cached import manifest as m
from lightning_itk.cached.shards import Shards
from lightning_itk.methods.cached_teacher import CachedTeacher
from lightning_itk.methods.teacher import Teacher


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(path, tmp_path_factory):
    """An unbroken run in one process."""
    output = tmp_path_factory.mktemp("cached") / "teacher"
    cache(path, output)
    assert len(Shards(output).manifest.shards) > 4
    return output


@pytest.mark.process
@pytest.mark.parametrize("mode", ["states", "topk"])
def test_a_killed_run_goes_on_to_the_same_bytes(mode, path, whole, tmp_path):
    options = {"mode": mode, "k": 8}
    assert run(_cache, path, tmp_path / "teacher", {**options, "kill_after": 3}) == -9
    assert {m.UNFINISHED, "shard-00002.safetensors"} <= hashes(tmp_path / "teacher").keys()
    with pytest.raises(ValueError, match="unfinished: run cache-teacher again"):
        itk.KDModule(tiny_model("llama", 0), str(tmp_path / "teacher"))
    (tmp_path / "teacher" / ".shard-00003.safetensors.123.tmp").write_text("half")
    before = (tmp_path / "teacher" / "shard-00001.safetensors").stat().st_mtime_ns
    cache(path, tmp_path / "teacher", **options)
    assert (tmp_path / "teacher" / "shard-00001.safetensors").stat().st_mtime_ns == before
    if mode == "topk":
        cache(path, tmp_path / "whole", **options)
    assert hashes(tmp_path / "teacher") == hashes(whole if mode == "states" else tmp_path / "whole")


def _cache(path, output, options) -> None:
    cache(path, output, **options)


@pytest.mark.process
def test_two_sharded_ranks_write_the_bytes_of_one(path, whole, tmp_path):
    """For DDP see the command's tests."""
    run_ranks(_cache, path, tmp_path / "teacher", {"strategy": "fsdp2", "ranks": 2})
    assert hashes(tmp_path / "teacher") == hashes(whole)


@pytest.mark.process
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_from_it_as_one_does(strategy, path, whole, tmp_path):
    """DAE whose second teacher is cached; its head is in no checkpoint, and no rank waits for it."""
    _train(path, str(whole), tmp_path / "one.pt")
    run_ranks(_train, path, str(whole), tmp_path / "two.pt", strategy, 2)
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    before = torch.cat([p.detach().flatten() for p in tiny_model("llama", 0).parameters()])
    assert (one - two).norm() / (one - before).norm() < 1e-5


def _train(path: str, folder: str, output, strategy: str = "auto", ranks: int = 1) -> None:
    teachers = {"general": Teacher(tiny_model("llama", 2)), "expert": CachedTeacher(folder)}
    options = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.3), "lr_scheduler": None}
    model = itk.DAEModule(tiny_model("llama", 0), teachers, **options)
    one = trainer(strategy, ranks, max_epochs=2, num_sanity_val_steps=0)
    one.fit(model, datamodule=data_module(path, batch_size=4 // ranks, shuffle=False))
    weights = (p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.student.parameters())
    flat = torch.cat([weight.flatten() for weight in weights])  # on every rank: both wait for each other
    assert all(name.startswith("student.") for name in model.state_dict())
    if one.is_global_zero:
        torch.save(flat, output)


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
CHANGES = {
    "data.max_length": {"data": {"max_length": 40}},
    "data.records": {"count": 20},
    "data.chat_template": {"data": {"chat_template": TEMPLATE}},
    "batches.batch_size": {"data": {"batch_size": 2}},
    "mode": {"mode": "topk", "k": 8},
    "weights": {"teacher": 3},
    "precision": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_are_refused_and_said(change, path, whole, tmp_path):
    """In a complete folder as in an unfinished one; overwrite begins anew."""
    shutil.copytree(whole, tmp_path / "teacher")
    options = dict(CHANGES[change])
    if "teacher" in options:
        options["teacher"] = Teacher(tiny_model("llama", options["teacher"], **WIDE))
    other = write_data(tmp_path, options.pop("count")) if "count" in options else path
    before = hashes(tmp_path / "teacher")
    with pytest.raises(ValueError, match=rf"was begun with {change} .*, now it is .*: use the same settings"):
        cache(other, tmp_path / "teacher", **options)
    assert hashes(tmp_path / "teacher") == before
    if change in ("mode", "data.records"):
        cache(other, tmp_path / "teacher", **options, overwrite=True)
        assert hashes(tmp_path / "teacher") != before
        Shards(tmp_path / "teacher").manifest.verify(tmp_path / "teacher")


def test_the_same_settings_find_it_complete_and_whole(path, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "teacher")
    (tmp_path / "teacher" / m.UNFINISHED).write_text("a kill left it")
    assert cache(path, tmp_path / "teacher").complete
    assert hashes(tmp_path / "teacher") == hashes(whole)
    shard = tmp_path / "teacher" / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="shard-00001.safetensors: is not what was written"):
        cache(path, tmp_path / "teacher")
    cache(path, tmp_path / "teacher", overwrite=True)
    assert hashes(tmp_path / "teacher") == hashes(whole)


def test_what_is_not_ours_is_left_alone(path, whole, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("theirs")
    (tmp_path / "file").write_text("theirs")
    shutil.copytree(whole, tmp_path / "mixed")
    (tmp_path / "mixed" / "notes.txt").write_text("theirs")
    for name, reason in (("theirs", "holds notes.txt, which no"), ("mixed", "holds notes.txt"), ("file", "is a file")):
        with pytest.raises(ValueError, match=reason):
            cache(path, tmp_path / name, overwrite=True)
    assert (tmp_path / "mixed" / m.NAME).exists()


def fit(path: str, folder, **data) -> None:
    module = itk.KDModule(tiny_model("llama", 0), str(folder))
    one = trainer(max_steps=1, limit_val_batches=0, num_sanity_val_steps=0)
    one.fit(module, datamodule=data_module(path, **data))


def test_a_wrong_pairing_is_refused_before_the_first_step(path, whole, tmp_path):
    fit(path, whole, shuffle=False, packing=True, validation=0, batch_size=2, seed=3)
    with pytest.raises(ValueError, match=r"lacks \d+ of 26 samples, .* differ in max_length \(48, here 30\)"):
        fit(path, whole, max_length=30)
    more = write_data(tmp_path, 30)
    with pytest.raises(ValueError, match=r"lacks 4 of 30 samples, the first is record 2\d: its data differ in records"):
        fit(more, whole)
    with pytest.raises(ValueError, match=r"lacks 26 of 26 samples, .* differ in chat_template"):
        fit(path, whole, chat_template=TEMPLATE)


def test_another_tokenizer_is_refused(whole, model_folder, tmp_path):
    itk.KDModule(model_folder("llama", 0), str(whole))
    shutil.copytree(model_folder("llama", 0), tmp_path / "student")
    file = tmp_path / "student" / "tokenizer.json"
    file.write_text(file.read_text().replace('"!": 3', '"!": 4').replace('"\\"": 4', '"\\"": 3'))
    with pytest.raises(ValueError, match="have different tokenizers: token 3 is"):
        itk.KDModule(str(tmp_path / "student"), str(whole))


def test_a_damaged_folder_is_one_line(whole, tmp_path):
    def broken(change) -> str:
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "t")
        change(tmp_path / "t")
        with pytest.raises(ValueError) as error:  # noqa: PT011
            CachedTeacher(str(tmp_path / "t"))
        assert "\n" not in str(error.value)
        return str(error.value)

    def damage(folder) -> None:
        content = bytearray((folder / "shard-00000.safetensors").read_bytes())
        content[:8] = b"\xff" * 8
        (folder / "shard-00000.safetensors").write_bytes(content)

    def elsewhere(folder) -> None:
        found = m.Manifest.read(folder)
        files = [file._replace(name="../../etc/passwd") for file in found.files]
        m.Manifest(**{**vars(found), "files": files}).write(folder)

    def other_rows(folder) -> None:
        shard = load_file(folder / "shard-00000.safetensors")
        shard["rows"][1] -= 1
        save_file(shard, folder / "shard-00000.safetensors")

    def scaled(folder) -> None:
        text = (folder / m.NAME).read_text()
        (folder / m.NAME).write_text(text.replace('"scale": 1.0', '"scale": 2.0'))

    def head(folder) -> None:
        content = bytearray((folder / m.HEAD).read_bytes())
        content[-1] ^= 1
        (folder / m.HEAD).write_bytes(content)

    assert "shard-00002.safetensors: is missing" in broken(lambda f: (f / "shard-00002.safetensors").unlink())
    assert "is missing or damaged" in broken(lambda f: (f / "shard-00002.safetensors").write_text("short"))
    assert "shard-00000.safetensors: is no safetensors file" in broken(damage)
    assert "is no manifest" in broken(elsewhere)
    assert "is no manifest" in broken(scaled)
    assert "samples of its shards are not those of its manifest" in broken(other_rows)
    assert "head.safetensors: is damaged" in broken(head)
    assert "is no manifest" in broken(lambda f: (f / m.NAME).write_text("{}"))


def test_a_full_disk_is_said_before_it_starts(path, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"needs 1\d\d kB, but 1 kB are free"):
        cache(path, tmp_path / "teacher")
    assert not list((tmp_path / "teacher").glob("shard*"))


def test_an_unknown_sample_is_named_in_the_step_too(path, whole):
    """Any DataLoader may train; there is nobody to ask before the first step."""
    module = itk.KDModule(tiny_model("llama", 0), CachedTeacher(str(whole)))
    with pytest.raises(ValueError, match="holds no answer to sample 0"):
        module.losses(b.pad(ragged_samples(2), pad_id=0))
    nothing = b.pad([b.Sample(*[torch.zeros(2).long().numpy() - i for i in (0, 100)], -1, -1)], pad_id=0)
    nothing["attention_mask"][:] = True
    assert module.losses(nothing)["distillation"].total == 0
