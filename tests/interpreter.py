"""Tests in Triton's interpreter, in a process of their own: TRITON_INTERPRET is read when Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from lightning_itk.kernels.launch import INTERPRET

inside = pytest.mark.skipif(not INTERPRET, reason="runs in the process that test_in_the_interpreter starts")
outside = pytest.mark.skipif(INTERPRET, reason="already in the interpreter")


def run_in_the_interpreter(file: str) -> None:
    """Run a file's tests again in the interpreter; all must pass."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
