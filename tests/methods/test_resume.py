"""kill -9 at any moment, resume, and end with the very same weights."""

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
@pytest.mark.parametrize(("method", "kills"), [("sft", [8, 2, 11]), ("sft", [29]), ("kd", [10])])
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


@pytest.mark.parametrize("when", ["validation", "time"])
def test_checkpoints_inside_an_accumulation_window_resume_to_the_bit(when, data, tmp_path):
    """Validation every 7 of 21 micro-batches, accumulated by 3; by time: after each of them."""
    runs.train_windows(data, tmp_path, tmp_path / "whole.pt", when)
    expected = torch.load(tmp_path / "whole.pt", weights_only=True)
    checkpoints = sorted(tmp_path.glob("saved/*.ckpt"))
    assert len(checkpoints) >= {"validation": 6, "time": 40}[when]
    for checkpoint in checkpoints[:: {"validation": 1, "time": 5}[when]]:
        runs.train_windows(data, tmp_path, tmp_path / "resumed.pt", when, checkpoint)
        result = torch.load(tmp_path / "resumed.pt", weights_only=True)
        assert result["step"] == expected["step"] == 14
        for name, weight in expected["weights"].items():
            assert weight.equal(result["weights"][name]), (checkpoint.name, name)
