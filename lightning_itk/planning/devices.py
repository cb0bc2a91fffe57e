"""What devices can do, from their makers' data sheets."""

import os
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """A kind of accelerator: dense rates without sparsity, memory as the driver shows it.

    Attributes:
        tflops: 10^12 operations per second of bf16 matrix products with fp32 sums.
        tflops_fp32: the same of fp32 without TF32, as torch multiplies by default.
        memory: GiB of one device.
        bandwidth: GB/s of its memory.
        source: where the numbers are from.
    """

    tflops: float
    tflops_fp32: float
    memory: float
    bandwidth: float
    source: str


DEVICES = {
    "h100": Device(989, 67, 79.6, 3350, "NVIDIA H100 SXM data sheet"),
    "h200": Device(989, 67, 140.4, 4800, "NVIDIA H200 SXM data sheet"),
    "a100-80": Device(312, 19.5, 80, 2039, "NVIDIA A100 SXM 80 GB data sheet"),
    "a100-40": Device(312, 19.5, 40, 1555, "NVIDIA A100 40 GB data sheet"),
    "l40s": Device(362, 91.6, 45, 864, "NVIDIA L40S data sheet"),
    "rtx4090": Device(165.2, 82.6, 24, 1008, "NVIDIA Ada GPU architecture paper, appendix A"),
    "b200": Device(2250, 75, 179, 8000, "NVIDIA Blackwell (HGX B200) data sheet"),
    "mi300x": Device(1307.4, 163.4, 192, 5300, "AMD Instinct MI300X data sheet"),
    "cpu": Device(1, 1, 0, 100, "a guess for a server; memory of this machine"),
}

SHARE_OF_PEAK = 0.4
"""Assumed share of a device's rate that training reaches in matrix products."""
SPARE = 0.92
"""Share of memory that tensors may take: the rest is for the context, NCCL and the holes of the allocator."""


def total_memory(kind: torch.device) -> int:
    """Bytes of a GPU, else of this machine."""
    if kind.type == "cuda":
        return torch.cuda.get_device_properties(kind).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device(name: str) -> Device:
    """A device of the table.

    Raises:
        ValueError: another name.
    """
    if name not in DEVICES:
        raise ValueError(f"device {name!r} is not known, expected {', '.join(DEVICES)}")
    if name == "cpu":
        return DEVICES[name]._replace(memory=round(total_memory(torch.device("cpu")) / 2**30, 1))
    return DEVICES[name]
