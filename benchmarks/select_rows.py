"""How fast a subset is chosen, and in how much memory: a scores file is written, read, scored and ranked.

    python benchmarks/select_rows.py --rows 10000000

Prints rows per second of each step and the peak memory of the process so far, the benchmark's own arrays included.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lightning_itk.selection import Order, sample_scores, select
from lightning_itk.selection.scores import append_epoch, read_scores, write_scores


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--clusters", type=int, default=300)
    parser.add_argument("--fraction", type=float, default=0.1)
    arguments = parser.parse_args()
    rows = arguments.rows

    def step(name: str, action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = action()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{name:34} {seconds:8.2f} s {rows / seconds / 1e6:8.1f} million rows/s {peak:6.2f} GiB peak", flush=True)
        return result

    print(f"{rows:,} rows, {arguments.clusters} clusters, {arguments.fraction:.1%}, {os.cpu_count()} cores")
    random = np.random.default_rng(0)
    losses = random.random((3, rows), dtype=np.float32)
    losses[:, random.random(rows) < 0.03] = np.nan
    tokens = random.integers(1, 512, rows, dtype=np.int32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.parquet"
        meta = {"fingerprint": "benchmark"}
        step("write 2 epochs", lambda: write_scores(path, np.arange(rows), tokens, losses, meta))
        step("append an epoch", lambda: append_epoch(path, losses[0]))
        del losses, tokens
        step("read what LP_app needs", lambda: read_scores(path, epochs=1))
        scores = step("read all", lambda: read_scores(path, epochs=2))
    step("LP(1)", lambda: sample_scores("lp", scores.losses, scores.tokens))
    values = step("LP_app", lambda: sample_scores("lp_app", scores.losses, scores.tokens))
    del scores
    clusters = random.integers(0, arguments.clusters, rows, dtype=np.int32)
    orders: tuple[Order, ...] = ("lowest", "middle", "random")
    for order in orders:
        step(f"select {order}", lambda order=order: select(values, arguments.fraction, order=order))
    for order in orders:
        step(
            f"select {order}, {arguments.clusters} clusters",
            lambda order=order: select(values, arguments.fraction, clusters=clusters, order=order),
        )


if __name__ == "__main__":
    main()
