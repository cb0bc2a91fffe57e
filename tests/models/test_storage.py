"""Checkpoints reach the disk whole or not at all, and no code in one runs."""

import os
import pickle
import shutil
import tempfile

import lightning as L
import pytest
import ranks
import runs
import torch
from exact import module
from lightning.fabric.plugins import TorchCheckpointIO
from processes import run_ranks

from lightning_itk.models.checkpoint import read_checkpoint
from lightning_itk.models.export import open_student
from lightning_itk.models.sharded import check_sharded, is_sharded
from lightning_itk.models.storage import WholeCheckpointIO, use_whole_checkpoints


def test_a_checkpoint_does_not_pass_through_tmpdir(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    path = tmp_path / "checkpoints" / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, path)
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert WholeCheckpointIO().load_checkpoint(path, weights_only=True)["weights"].sum() == 3


def test_a_save_that_fails_leaves_the_previous_one(tmp_path, monkeypatch):
    path, io = tmp_path / "last.ckpt", WholeCheckpointIO()
    io.save_checkpoint({"step": 1}, path)

    def full(checkpoint, file):
        file.write(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nand where")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match=r"last\.ckpt: the checkpoint cannot be written: Pytorch.*failed$"):
        io.save_checkpoint({"step": 2}, path)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert io.load_checkpoint(path, weights_only=True) == {"step": 1}


def test_a_folder_of_somebody_is_not_replaced(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"last\.ckpt: is a folder and no checkpoint"):
        WholeCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt" / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_every_module_saves_this_way_but_a_given_io_stays():
    class Own(TorchCheckpointIO):
        pass

    for io, kind in ((None, WholeCheckpointIO), (Own(), Own)):
        trainer = L.Trainer(accelerator="cpu", logger=False, plugins=[io] if io else None, max_steps=0)
        trainer.fit(module("sft"), torch.utils.data.DataLoader([]))
        use_whole_checkpoints(trainer.strategy)  # again, as a second fit does
        assert type(trainer.strategy.checkpoint_io) is kind


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A checkpoint folder of two ranks after three steps, and the final weights of that run."""
    folder = tmp_path_factory.mktemp("sharded")
    run_ranks(ranks.fit, runs.write_records(folder), folder, "whole", "fsdp2", 2)
    return folder / "whole" / "step=12.ckpt", torch.load(folder / "whole.pt", weights_only=True)["weights"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.process
def test_a_folder_is_read_as_one_checkpoint(sharded, model_folder, tmp_path):
    folder, weights = sharded
    content = read_checkpoint(folder)
    light = read_checkpoint(folder, lazy=True)
    assert "optimizer_states" not in light
    assert light["state_dict"].keys() == content["state_dict"].keys()
    assert content["global_step"] == 12
    assert torch.cat([t.flatten() for t in content["state_dict"].values()]).equal(weights)
    assert {*content["optimizer_states"][0]["state"]} == set(range(len(content["state_dict"])))
    trained = open_student(folder, model_folder("llama", 0))
    assert trained.step == 12
    assert all(parameter.is_meta for parameter in trained.saved.model.parameters())
    names = [name for name, _ in trained.saved.model.named_parameters()]
    assert torch.cat([t.flatten() for t in trained.weights.read(names).values()]).equal(weights)


@pytest.mark.process
@pytest.mark.parametrize("where", ["description", "value", "extra", "gone", "cut"])
def test_no_code_in_a_folder_runs(where, sharded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "evil.ckpt"
    shutil.copytree(sharded[0], folder)
    description = check_sharded(folder)
    if where == "description":
        description.planner_data["evil"] = Evil()
        (folder / ".metadata").write_bytes(pickle.dumps(description))
    elif where == "value":
        index = next(index for index in description.storage_data if index.fqn.endswith(".lr"))
        stored = description.storage_data[index]
        path = folder / stored.relative_path
        content = path.read_bytes()
        torch.save(Evil(), tmp_path / "evil.pt")
        description.storage_data[index].offset = len(content)
        description.storage_data[index].length = (tmp_path / "evil.pt").stat().st_size
        path.write_bytes(content + (tmp_path / "evil.pt").read_bytes())
        (folder / ".metadata").write_bytes(pickle.dumps(description))
    elif where == "extra":
        torch.save({"hyper_parameters": Evil(), "global_step": 1}, folder / "meta.pt")
    elif where == "gone":
        (folder / "meta.pt").unlink()
    else:
        (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:1000])
    assert is_sharded(folder) == (where != "gone")
    with pytest.raises(ValueError, match=r"evil\.ckpt: is no (complete checkpoint folder|checkpoint of this kit)"):
        read_checkpoint(folder)
    if where != "extra":  # which Lightning reads with weights_only
        with pytest.raises(ValueError, match=r"evil\.ckpt: is no"):
            check_sharded(folder)
    assert not (tmp_path / "ran").exists()
