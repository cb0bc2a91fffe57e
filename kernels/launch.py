"""Where a kernel runs and with which tile: device checks, the static table per architecture, the dot helper.

Tiles are chosen by plain functions from tables that were read off the compiler (registers, spills, shared memory; see
README.md). There is no search at run time, so a run never depends on what an autotuner happened to time.
"""

import contextlib
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

INTERPRET: bool = os.environ.get("TRITON_INTERPRET", "0") == "1"  # per process: Triton reads it at import
IGNORE_INDEX = -100
KINDS = {"none": 0, "forward": 1, "reverse": 2, "jsd": 3}

NONE = tl.constexpr(0)
FORWARD = tl.constexpr(1)
REVERSE = tl.constexpr(2)
JSD = tl.constexpr(3)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
UPCAST = tl.constexpr(INTERPRET)  # the interpreter cannot multiply bf16
TINY = tl.constexpr(1.2e-38)  # above the smallest normal fp32: no GPU flushes it to 0
MAX_HEAD_DIM = 256
FUSED_BYTES = 256 << 20  # of fp32 buffers for dq at most
LOWEST = tl.constexpr(-1.0e30)  # start of a running maximum: finite, so that differences of two are never nan


class Tile(NamedTuple):
    """One launch configuration."""

    block_m: int  # rows (queries, tokens)
    block_n: int  # columns (keys, vocabulary)
    warps: int
    stages: int


def architecture(device: torch.device) -> str:
    """The row of the tables that `device` uses, or its own name where there is none."""
    if INTERPRET:
        return "interpret"
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return {(10, 3): "sm_100", (12, 1): "sm_120"}.get((major, minor), f"sm_{major}{minor}")


ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


@torch.compiler.assume_constant_result
def supported(device: torch.device) -> str | None:
    """None where the kernels run, else the reason they do not, as one line."""
    name = architecture(device)
    if name == "interpret" or name in ARCHITECTURES:
        return None
    if name == "cpu":
        return "Triton kernels need a GPU (or TRITON_INTERPRET=1 set before Python starts), found device cpu"
    return f"Triton kernels have tiles for {', '.join(ARCHITECTURES)}, found {name}"


@torch.compiler.assume_constant_result
def attention_refusal(device: torch.device, dim: int) -> str | None:
    """None where the attention kernels run for models whose larger head dim is `dim`, else the reason as one line."""
    reason = supported(device)
    if reason is None and dim > MAX_HEAD_DIM:
        reason = f"head dim {dim} does not fit the attention kernels, which hold up to {MAX_HEAD_DIM}"
    return reason


def require(device: torch.device) -> None:
    """Raise where `supported` has a reason."""
    reason = supported(device)
    if reason is not None:
        raise ValueError(reason)


def guard(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make `tensor`'s device current: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def eager(tensor: Tensor) -> bool:
    """Whether nobody looks at how a loss is made: no compiler, no mode over all operators, no tensor of another kind.

    Then it runs as an `autograd.Function`; torch takes 0.1 ms to call an operator of twenty arguments.
    """
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None


def row_tile(arch: str) -> tuple[int, int]:
    """Columns per step and warps of the row kernels, whose program walks one row of logits."""
    # 4096 / 8 warps needs 40-130 registers; one tile as wide as the vocabulary spills.
    return (64, 1) if arch == "interpret" else (4096, 8)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def soft_cap(z, cap):
    """cap · tanh(z / cap), by exp2: exact at both ends, error below 1e-7 · cap between."""
    return cap * (1.0 - 2.0 / (tl.exp2(z * (2.0 / cap) * LOG2E) + 1.0))


def precision(arch: str, dtype: torch.dtype) -> str:
    """How the fused head multiplies fp32: three TF32 products on NVIDIA (fp32 accuracy), else plainly."""
    return "tf32x3" if dtype == torch.float32 and arch.startswith("sm_") else "ieee"


def eval_tile(arch: str, itemsize: int, plain: bool) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, warps and stages of the fused head: two fp32 accumulators of BLOCK_M x BLOCK_N.

    `plain` is forward or reverse KL without bias and soft-cap; everything else needs more registers.
    """
    if arch == "interpret":
        return 16, 32, 16, 1, 1
    stages = 1 if arch == "gfx942" else 3
    narrow = arch in ("sm_80", "sm_86", "sm_89", "sm_120")
    if itemsize == 4:
        return (64, 32 if narrow else 64, 32, 8, min(stages, 2))
    return (128, 64 if narrow or not plain else 128, 64, 8, stages)


# Attention tiles for 2-byte inputs by (kernel, padded head dim): the plain problem's, and every other problem's. Chosen
# as the largest that the compiler fits without spills, and sm_90's plain forward of dim 64 by the static model in
# README.md; block_m is queries, block_n keys.
_Tiles = dict[tuple[str, int], tuple[tuple[int, int, int, int], tuple[int, int, int, int]]]
_ATTENTION: dict[str, _Tiles] = {
    "sm_80": {
        ("forward", 64): ((64, 64, 4, 2), (128, 64, 8, 3)),
        ("forward", 128): ((128, 64, 8, 3), (128, 64, 8, 3)),
        ("forward", 256): ((64, 64, 8, 2), (64, 64, 8, 2)),
        ("dq", 64): ((64, 32, 4, 2), (64, 64, 8, 2)),
        ("dq", 128): ((64, 64, 8, 2), (32, 32, 4, 2)),
        ("dq", 256): ((64, 32, 8, 2), (16, 32, 8, 2)),
        ("dk", 64): ((64, 128, 8, 2), (64, 64, 8, 2)),
        ("dk", 128): ((32, 128, 8, 2), (32, 64, 8, 2)),
        ("dk", 256): ((32, 64, 8, 2), (32, 32, 8, 2)),
    },
    "sm_90": {
        ("forward", 64): ((128, 64, 8, 2), (128, 128, 8, 3)),
        ("forward", 128): ((128, 64, 8, 3), (128, 64, 8, 3)),
        ("forward", 256): ((64, 64, 8, 2), (64, 64, 8, 2)),
        ("dq", 64): ((128, 64, 8, 3), (128, 64, 8, 3)),
        ("dq", 128): ((128, 64, 8, 3), (128, 32, 8, 2)),
        ("dq", 256): ((64, 32, 8, 2), (64, 32, 8, 2)),
        ("dk", 64): ((64, 128, 8, 3), (64, 64, 8, 2)),
        ("dk", 128): ((64, 128, 8, 2), (32, 64, 8, 2)),
        ("dk", 256): ((32, 64, 8, 2), (32, 32, 8, 2)),
    },
    "sm_100": {
        ("forward", 64): ((128, 128, 8, 3), (128, 128, 8, 3)),
        ("forward", 128): ((128, 64, 8, 3), (64, 64, 8, 2)),
        ("forward", 256): ((64, 64, 8, 2), (64, 64, 8, 2)),
        ("dq", 64): ((128, 64, 8, 3), (128, 64, 8, 3)),
        ("dq", 128): ((128, 64, 8, 3), (128, 32, 8, 2)),
        ("dq", 256): ((128, 32, 8, 2), (32, 32, 8, 2)),
        ("dk", 64): ((64, 64, 8, 2), (64, 64, 8, 2)),
        ("dk", 128): ((32, 128, 8, 2), (32, 32, 4, 2)),
        ("dk", 256): ((32, 64, 8, 1), (32, 32, 8, 2)),
    },
    "gfx942": {
        ("forward", 64): ((128, 64, 8, 1), (128, 64, 8, 1)),
        ("forward", 128): ((128, 64, 8, 1), (128, 64, 8, 1)),
        ("forward", 256): ((64, 64, 4, 1), (64, 64, 4, 1)),
        ("dq", 64): ((128, 32, 8, 1), (128, 32, 4, 1)),
        ("dq", 128): ((128, 32, 8, 1), (128, 32, 4, 1)),
        ("dq", 256): ((64, 32, 4, 1), (64, 32, 4, 1)),
        ("dk", 64): ((32, 128, 8, 1), (32, 128, 4, 1)),
        ("dk", 128): ((32, 128, 4, 1), (32, 128, 4, 1)),
        ("dk", 256): ((32, 32, 4, 1), (32, 64, 4, 1)),
    },
}
# What does not fit the 99 KiB of shared memory that a program gets on cards for desks; the rest is sm_80's.
_SMALLER: _Tiles = {
    ("forward", 128): ((128, 64, 8, 2), (128, 64, 8, 2)),
    ("forward", 256): ((64, 32, 8, 2), (64, 32, 8, 2)),
    ("dq", 256): ((32, 64, 8, 1), (16, 32, 8, 2)),
    ("dk", 256): ((32, 64, 8, 1), (32, 32, 8, 2)),
}
_ATTENTION |= dict.fromkeys(("sm_86", "sm_89", "sm_120"), _ATTENTION["sm_80"] | _SMALLER)
_ATTENTION["sm_120"] = _ATTENTION["sm_86"] | {("dk", 128): ((32, 128, 8, 2), (32, 64, 8, 3))}  # 2 stages spill 8 bytes


def attention_tile(arch: str, kernel: str, dim: int, itemsize: int, plain: bool) -> Tile:
    """Tile of the attention kernels "forward", "dq" and "dk".

    Args:
        dim: the larger of both models' head dims, padded to a power of two.
        itemsize: bytes of an element, the same for both models.
        plain: one teacher head per student head, one teacher key head per student key head, no soft-cap and head dims
            that need no padding. Everything else needs more registers.
    """
    if arch == "interpret":
        return Tile(16, 32, 1, 1) if kernel == "forward" else Tile(32, 16, 1, 1)
    dim = max(64, dim)
    if itemsize == 4:  # plain fp32 arithmetic: for exactness, not for speed
        if arch == "gfx942":
            rows, cols = (64 if kernel != "dk" else 32, 32) if dim < 256 else (32 if kernel != "dk" else 16, 16)
            return Tile(rows, cols, 4, 1)
        smaller = {("dq", 256): (16, 16), ("dk", 256): (16, 16)}
        if arch in ("sm_90", "sm_100", "sm_120"):
            smaller["forward", 128] = (16, 32)
        return Tile(*smaller.get((kernel, dim), (32, 32)), 8, 1)
    return Tile(*_ATTENTION[arch][kernel, dim][0 if plain else 1])


# The fused backward kernel, by (architecture, padded head dim): the tile of causal forward KL without any mask, and of
# every other plain problem. What is not here spills or does not fit, and takes the two kernels.
_FUSED = {
    ("sm_80", 64): ((64, 128, 8, 2), (64, 64, 4, 2)),
    ("sm_80", 128): ((32, 64, 4, 1), (32, 32, 4, 2)),
    ("sm_90", 64): ((64, 128, 8, 2), (64, 128, 8, 3)),
    ("sm_90", 128): ((64, 128, 8, 2), (32, 128, 8, 2)),
    ("sm_100", 64): ((32, 128, 8, 2), (32, 128, 8, 2)),
    ("sm_100", 128): ((32, 128, 8, 2), (32, 128, 8, 2)),
}


def fused_tile(arch: str, dim: int, itemsize: int, plain: bool, bare: bool) -> Tile | None:
    """Tile of the attention kernel that makes dq and dk together; None where the two kernels have to.

    Args:
        dim, itemsize, plain: as for `attention_tile`.
        bare: causal forward KL with no other mask, of keys or rows.
    """
    if arch == "interpret":
        return Tile(32, 16, 1, 1)
    tiles = _FUSED.get((arch, max(64, dim)))
    return Tile(*tiles[0 if bare else 1]) if tiles and plain and itemsize == 2 else None


def fused_splits(device: torch.device, tile: Tile, groups: int, blocks: int, part_bytes: int) -> int:
    """How many programs share the key blocks of one key head: enough to fill the card, if blocks and memory allow.

    Args:
        groups: key heads of all batch rows.
        blocks: key blocks of one.
        part_bytes: of a split's dq in fp32. All together take at most `FUSED_BYTES`: 0 where one alone takes more.
    """
    processors = 12 if INTERPRET else torch.cuda.get_device_properties(device).multi_processor_count
    programs = processors * (8 // tile.warps)  # a processor's registers hold eight warps of these
    return min(-(-programs // groups), blocks, FUSED_BYTES // part_bytes)
