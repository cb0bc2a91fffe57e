import numpy as np
import pytest
import runs
import torch
from processes import run, run_ranks

from lightning_itk.selection.scores import read_scores

pytestmark = pytest.mark.process


def scores(folder):
    return read_scores(folder / "scores.parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_records(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def recorded(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    assert run(runs.record, data, folder) == 0
    return scores(folder)


def test_every_sample_once_with_its_mean_response_loss(recorded):
    assert recorded.epochs == 2
    assert len(recorded.record) == len(set(recorded.record)) == 41
    assert (recorded.tokens > 0).all()
    assert (recorded.losses[2].mean() < recorded.losses[0].mean()).all()
    assert recorded.meta["model"]


@pytest.mark.parametrize("variant", ["packed", "eval batches of 3"])
def test_the_layout_does_not_matter(variant, data, recorded, tmp_path):
    options = {"packing": True} if variant == "packed" else {"eval_batch_size": 3}
    assert run(runs.record, data, tmp_path, 0, options) == 0
    again = scores(tmp_path)
    assert again.record.tolist() == recorded.record.tolist()
    np.testing.assert_allclose(again.losses[0], recorded.losses[0], rtol=1e-5)


def test_two_ranks_record_what_one_does(data, recorded, tmp_path):
    run_ranks(runs.record, data, tmp_path, 0, {"batch_size": 1})
    both = scores(tmp_path)
    assert both.record.tolist() == recorded.record.tolist()
    assert both.tokens.tolist() == recorded.tokens.tolist()
    np.testing.assert_allclose(both.losses, recorded.losses, rtol=1e-4)


@pytest.mark.parametrize(("kill_after", "written", "left"), [(10, 0, 2), (25, 1, 1)])
def test_killed_and_resumed_runs_leave_identical_scores(kill_after, written, left, data, recorded, tmp_path):
    assert run(runs.record, data, tmp_path, kill_after) == -9
    assert scores(tmp_path).epochs == written  # never a broken file
    assert run(runs.record, data, tmp_path) == 0
    assert scores(tmp_path).losses.tolist() == recorded.losses.tolist()
    assert torch.load(tmp_path / "scored.pt", weights_only=True) == left  # no epoch was scored twice
