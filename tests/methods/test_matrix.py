"""Two and four ranks against one process, saved on two and resumed on others; `make ranks` does all of it."""

import matrix
import pytest
from matrix import ALONE, Run

pytestmark = pytest.mark.process

DDP, FSDP2, DDP4, FSDP4 = matrix.PLACES
RUNS = [
    Run("sft", DDP4, FSDP2),
    Run("sft", FSDP4, DDP),
    Run("kd", FSDP4),
    Run("dae", FSDP4),
    Run("lora", FSDP2),
    Run("lora", ALONE, FSDP2),
    Run("lora", FSDP4, FSDP2),
]


def test_ranks_equal_one_process(tmp_path):
    """Weights at the end of an epoch whose last step leaves three of four ranks without a sample, and both exports."""
    matrix.prepare(tmp_path)
    rows = matrix.table(tmp_path, RUNS)
    assert [row.run for row in rows] == RUNS
    for row in rows:
        assert row.relative < 1e-5, row
        assert row.exported < 1e-6, row
