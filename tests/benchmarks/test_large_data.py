"""The data path at size, in its tiny form."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import large_data  # noqa: E402
import pytest  # noqa: E402

from lightning_itk.data.sampler import BatchSampler  # noqa: E402


def test_every_step_in_tiny_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    plan = BatchSampler._make_plan
    rows = large_data.main(["--tiny", "--folder", str(tmp_path)])
    assert [row["step"].split(",")[0] for row in rows] == [
        "tokenize", "fit padded", "fit padded", "fit packed", "fit a subset", "the same",
    ]  # fmt: skip
    for row in rows[1:]:
        assert row["private_mib"] >= row["grown_mib"] >= row["kept_mib"]
        assert row["file_mib"] > 0
        assert row["plan_cpu_s"] <= row["cpu_s"]
        assert "prepare_data_s" in row
        assert "setup_s" in row
    assert BatchSampler._make_plan is plan
    assert [*tmp_path.iterdir(), *here.iterdir()] == [here]  # nothing is left
