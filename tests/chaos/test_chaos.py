"""What `make chaos` is made of: a difference is found, and so is what a kill leaves behind. A short chain of kills."""

import json
import random
import shutil

import pytest
import torch
from chaos import run
from chaos.arms import Arm
from chaos.attempt import Kill
from chaos.chain import Reference, kill_until_the_end
from chaos.compare import differences
from chaos.remains import leftovers, unusable
from chaos.summary import Summary
from torch.distributed import checkpoint as sharded

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),  # a test that resumes writes to a folder of its own
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
EVERY_STEP = {"every_n_train_steps": 1, "save_top_k": -1, "dirpath": "runs"}
SMALL = Arm("small", saving=EVERY_STEP, records=31, validate=5)  # 27 to train on: 14 micro-batches and 5 steps an epoch


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return SMALL.write(tmp_path_factory.mktemp("arm"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run.train(0, 0, ["--config", str(config)]) == 0
    return folder


def one_batch_further(checkpoint):
    checkpoint["InstructionDataModule"]["train"]["batches"] += 1


def other_random_numbers(checkpoint):
    checkpoint["rng_states"] = None


def no_momentum(checkpoint):
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state["exp_avg"].zero_()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (None, None),
        (one_batch_further, "samples"),
        (other_random_numbers, "loss"),
        (no_momentum, "tensors differ"),
    ],
)
def test_a_resume_from_a_wrong_position_is_found(change, expected, config, whole, tmp_path, monkeypatch):
    checkpoint = torch.load(whole / "runs" / "epoch=0-step=2.ckpt", weights_only=True)
    if change is not None:
        change(checkpoint)
    torch.save(checkpoint, tmp_path / "from.ckpt")
    shutil.copy(whole / "journal-00-0.jsonl", tmp_path)  # what it did before it was killed
    monkeypatch.chdir(tmp_path)
    assert run.train(1, 0, ["--config", str(config), "--ckpt_path", "from.ckpt"]) == 0
    found = differences(whole, tmp_path)
    if expected is None:
        assert found == []
    else:
        assert any(expected in line for line in found), found


def test_what_is_missing_is_a_difference(whole, tmp_path):
    assert differences(tmp_path, whole) == [f"{tmp_path}: holds no run that came to its end"]
    lines = (whole / "journal-00-0.jsonl").read_text().splitlines()
    (tmp_path / "journal-00-0.jsonl").write_text("\n".join(line for line in lines if "[1, 3]" not in line))
    found = differences(whole, tmp_path)
    assert found == ["final-0.pt: is not there", "rank 0: never saw [1, 3] (1 such)"]


def test_checkpoints_that_are_none_are_found(whole, tmp_path):
    runs = tmp_path / "runs" / "version_0"
    good = next(iter((whole / "runs").glob("*.ckpt"))).read_bytes()
    for name in ("good", "torn-shard", "no-metadata"):
        runs.mkdir(parents=True, exist_ok=True)
        sharded.save({"w": torch.ones(9, 9)}, checkpoint_id=runs / f"{name}.ckpt", no_dist=True)
        torch.save({"global_step": 3}, runs / f"{name}.ckpt" / "meta.pt")
    (runs / "no-metadata.ckpt" / ".metadata").unlink()
    (shard,) = (runs / "torn-shard.ckpt").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-100])
    (runs / "good-file.ckpt").write_bytes(good)
    (runs / "torn-file.ckpt").write_bytes(good[: len(good) // 2])
    (runs / "empty.ckpt").touch()
    (runs / "last.ckpt").symlink_to("removed.ckpt")  # passed by
    expected = ["empty", "no-metadata", "torn-file", "torn-shard"]
    assert [path.stem for path in unusable(tmp_path)] == expected
    (runs / ".last.ckpt.7.tmp").write_bytes(b"123")
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "tmpabc").write_bytes(b"12")
    assert list(leftovers(tmp_path, tmp_path / "tmp").values()) == [2, 3]


@pytest.mark.process
def test_a_short_chain_of_kills(tmp_path, monkeypatch):
    kills = iter([Kill(0.0, "save", 3), Kill(0.05, "train", 2)])
    monkeypatch.setattr("chaos.chain.moment", lambda *_, **__: next(kills))
    reference = Reference(Arm("short", records=61), tmp_path / "short", tmp_path / "tmp").make()
    chain = kill_until_the_end(reference, tmp_path / "killed", tmp_path / "tmp", random.Random(0), most=2)
    summary = Summary([reference.arm], 0)
    assert "identical" in summary.add(chain), chain
    assert len(chain.kills) == chain.resumes == 2  # a busy machine kills a moment later, in another phase
    assert not summary.failed
    assert json.loads(summary.json())["kills"] == summary.kills == 2
    chain.problems.append("weights differ")
    assert summary.failed
    assert "short: weights differ" in summary.text()
