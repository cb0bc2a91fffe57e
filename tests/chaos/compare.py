"""What is different between two runs of the same arm: final weights, steps, samples and losses on the way there."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def differences(expected: Path, found: Path) -> list[str]:
    """What a run in `found` has done otherwise than the one in `expected`; empty where they are the same to the bit.

    A killed run does some micro-batches more than once. Every time they must have the same samples and the same loss.
    """
    lines = []
    for path in sorted(expected.glob("final-*.pt")):
        rank = path.stem.removeprefix("final-")
        lines += _weights(path, found / path.name)
        lines += _journals(expected, found, rank)
    return lines or ([] if any(expected.glob("final-*.pt")) else [f"{expected}: holds no run that came to its end"])


def _weights(expected: Path, found: Path) -> list[str]:
    if not found.exists():
        return [f"{found.name}: is not there"]
    one, other = (torch.load(path, weights_only=True) for path in (expected, found))
    lines = [] if one["step"] == other["step"] else [f"{found.name}: step {other['step']}, expected {one['step']}"]
    if one["weights"].keys() != other["weights"].keys():
        return [*lines, f"{found.name}: other tensors"]
    names = [name for name, weight in one["weights"].items() if not torch.equal(weight, other["weights"][name])]
    if names:
        largest = max((one["weights"][name] - other["weights"][name]).abs().max().item() for name in names)
        lines.append(f"{found.name}: {len(names)} of {len(one['weights'])} tensors differ, by up to {largest:.1e}")
    return lines


def _journals(expected: Path, found: Path, rank: str) -> list[str]:
    wanted = {at: entry for _, at, entry in _entries(expected, rank)}
    missing, wrong = dict(wanted), []
    for path, at, entry in _entries(found, rank):
        missing.pop(at, None)
        if entry != wanted.get(at):
            wrong.append(f"{path.name}: {at} had {entry}, expected {wanted.get(at)}")
    lines = [f"{wrong[0]} ({len(wrong)} such)"] if wrong else []
    if missing:
        lines.append(f"rank {rank}: never saw {', '.join(list(missing)[:4])} ({len(missing)} such)")
    return lines


def _entries(folder: Path, rank: str) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """(file, which micro-batch or validation, what is known of it)"""
    for path in sorted(folder.glob(f"journal-*-{rank}.jsonl")):
        for entry in map(json.loads, path.read_text().splitlines()):
            if "at" in entry:
                yield path, str(entry.pop("at")), entry
