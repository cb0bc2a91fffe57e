"""What a result was measured on: names and versions, and the two ceilings of the machine, measured in the same run."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from providers import PROVIDERS
from torch import Tensor

PEERS = tuple(dict.fromkeys(provider.package for provider in PROVIDERS.values() if provider.package))


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return name


def _commit() -> str:
    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        code = (":/lightning_itk", ":/kernels", ".", ":(exclude)results")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ITK_COMMIT", "unknown")  # a copy of the tree without its history


@cache
def describe(device: str) -> dict[str, Any]:
    """The columns that every result row carries."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "kind": device,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(load, 1),
        "clock": "device events" if device == "cuda" else "processor time",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": version("triton"),
        "python": platform.python_version(),
        "peers": {name: version(name) for name in ("lightning", "transformers", *PEERS)},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": _commit(),
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def device_works(device: str) -> bool:
    """False after an error that leaves a process without its GPU."""
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


def clock(device: str) -> float:
    """Seconds for differences. On a CPU the time this process computes, so that others on the machine hardly count."""
    return time.perf_counter() if device == "cuda" else time.process_time()


def _median_seconds(action: Any, device: str, repeats: int) -> float:
    action()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = clock(device)
        action()
        synchronize(device)
        seconds.append(clock(device) - start)
    return sorted(seconds)[len(seconds) // 2]


@cache
def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square product of random numbers in `dtype`."""
    n = 8192 if device == "cuda" else 512
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _median_seconds(lambda: a @ b, device, 10)


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read plus written."""
    source = torch.randn(2**28 if device == "cuda" else 2**23, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device, 10)


@cache
def _flush_buffer(device: str) -> Tensor:
    # Larger than the last-level cache: 50 to 256 MiB on today's GPUs.
    return torch.empty(2**29 if device == "cuda" else 2**25, dtype=torch.int8, device=device)


def flush_cache(device: str) -> None:
    """Drop what the last call left in the cache, so that every sample starts from memory."""
    _flush_buffer(device).zero_()
