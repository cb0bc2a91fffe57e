"""kill -9 at any moment, resume, and end with the very same weights."""

import functools

import pytest
import runs
import torch
from processes import run

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_records(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    results = {}

    def make(method):
        if method not in results:
            folder = tmp_path_factory.mktemp(method)
            assert run(runs.train, method, data, folder, folder / "final.pt") == 0
            results[method] = torch.load(folder / "final.pt", weights_only=True)
        return results[method]

    return make


# 41 training samples in micro-batches of 2, accumulated by 3: 21 micro-batches and 7 steps an epoch.
@pytest.mark.parametrize(("method", "kills"), [("sft", [8, 2, 11]), ("sft", [29]), ("kd", [10]), ("moe", [20])])
def test_killed_runs_end_with_the_same_weights(method, kills, data, uninterrupted, tmp_path):
    for number, kill in enumerate(kills):
        code = run(runs.train, method, data, tmp_path, tmp_path / "never.pt", number > 0, kill)
        assert code == -9
        assert not (tmp_path / "never.pt").exists()
    assert run(runs.train, method, data, tmp_path, tmp_path / "final.pt", True) == 0
    result, expected = torch.load(tmp_path / "final.pt", weights_only=True), uninterrupted(method)
    assert result["step"] == expected["step"] == 14
    assert result["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert weight.equal(result["weights"][name]), name
    if method == "kd":
        assert not [name for name in expected["weights"] if "teacher" in name]


SAVED = {  # when, micro-batches between two validations -> how many checkpoints there are, and which are resumed
    ("validation", 7): (6, slice(None)),
    ("time", 7): (42, slice(0, None, 5)),
    ("time", 6): (42, slice(5, None, 15)),
}


@pytest.mark.parametrize(("when", "interval"), SAVED)
def test_a_checkpoint_resumes_to_the_bit_wherever_it_was_written(when, interval, data, tmp_path):
    """After a validation, or by time after any micro-batch: inside an accumulation window, before a validation that is
    due (interval 6: the first of them), before the end of an epoch with a validation (7) and without one (6)."""
    runs.train_windows(data, tmp_path, tmp_path / "whole.pt", when, None, interval)
    expected = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert [name for name in expected["seen"] if "end of" in name] == ["end of epoch 0", "end of epoch 1"]
    assert len(expected["seen"]) == 8
    checkpoints = sorted(tmp_path.glob("saved/*.ckpt"))
    count, chosen = SAVED[when, interval]
    assert len(checkpoints) >= count
    for checkpoint in checkpoints[chosen]:
        runs.train_windows(data, tmp_path, tmp_path / "resumed.pt", when, checkpoint, interval)
        result = torch.load(tmp_path / "resumed.pt", weights_only=True)
        assert result["step"] == expected["step"] == 14
        assert result["seen"] == expected["seen"], checkpoint.name
        assert result["logged"] == expected["logged"], checkpoint.name
        for name, weight in expected["weights"].items():
            assert weight.equal(result["weights"][name]), (checkpoint.name, name)


@pytest.mark.parametrize(("when", "interval"), [("validation", 7), ("time", 7), ("epoch", 1.0)])
def test_a_plateau_is_met_by_a_resumed_run_too(when, interval, data, tmp_path):
    """The rate falls at the end of an epoch, wherever in the epoch the checkpoint was written."""
    train = functools.partial(runs.train_windows, data, tmp_path, when=when, interval=interval, plateau=True)
    train(tmp_path / "whole.pt")
    expected = torch.load(tmp_path / "whole.pt", weights_only=True)
    checkpoints = sorted(tmp_path.glob("saved/*.ckpt"))
    if when == "time":  # before the last micro-batch of an epoch, after it, and in the middle of the next
        checkpoints = [checkpoints[20], checkpoints[21], checkpoints[30]]
    for checkpoint in checkpoints[:-1][:4]:  # not the end of the run
        train(tmp_path / "resumed.pt", resume=checkpoint)
        result = torch.load(tmp_path / "resumed.pt", weights_only=True)
        assert result["rate"] == expected["rate"] == pytest.approx(1e-5), checkpoint.name
        for name, weight in expected["weights"].items():
            assert weight.equal(result["weights"][name]), (checkpoint.name, name)
