"""Every kernel with every shipped tile goes through the real compiler for every architecture, without a GPU.

Asserted from the machine code: no register spills, shared memory within the device's limit, tensor-core instructions.
"""

import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton")
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_itk.kernels import attention_backward, attention_forward, launch, linear_eval, rows

pytestmark = pytest.mark.skipif(launch.INTERPRET, reason="the compiler needs a process without TRITON_INTERPRET")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The tiles were chosen with Triton 3.7; 3.6 spills up to 40 bytes in three of the heaviest sets of options.
SLACK = 64 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 0
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes one program may use
TENSOR_CORE = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma|mma\.sync",
    "sm_100": r"tcgen05\.mma|mma\.sync",
    "gfx942": r"v_mfma",
}
FLOATS = {"scale_s", "scale_t", "cap_s", "cap_t", "to_log2", "unit", "factor", "temperature", "beta"}
FLOATS |= {"student_scale", "teacher_scale", "student_cap", "teacher_cap", "kl_weight", "ce_weight"}
UNALIGNED = {"S", "window", "v", "n", "tiles_per_split"}  # sizes; strides and widths are multiples of 16 in practice


class Case(NamedTuple):
    """One compilation: the kernel, the element types of its pointers, its constants and its launch options."""

    name: str
    arch: str
    kernel: str
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    multiplies: bool


class Figures(NamedTuple):
    registers: int
    spilled: int  # bytes (NVIDIA) or registers (AMD)
    shared: int  # bytes
    tensor_core: int  # instructions


def compile_case(case: Case) -> Figures:
    kernel = KERNELS[case.kernel]
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in case.constants:
            signature[name], constants[(i,)] = "constexpr", case.constants[name]
        elif name.endswith("_ptr"):
            signature[name], attributes[(i,)] = "*" + case.pointers.get(name, "fp32"), [["tt.divisibility", 16]]
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name not in UNALIGNED:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    compiled = triton.compile(source, target=TARGETS[case.arch], options=options)
    if case.arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{k}:\s+(\d+)", text)[1]) for k in ("vgpr_count", "vgpr_spill_count"))  # type: ignore[index]
    else:
        text = compiled.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        found = {k: int(re.search(rf"{k}:(\d+)", usage)[1]) for k in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
        registers, spilled = found["REG"], found["STACK"] + found["LOCAL"]
    return Figures(registers, spilled, compiled.metadata.shared, len(re.findall(TENSOR_CORE[case.arch], text)))


MASKS = {"WINDOW": True, "SEGMENTS": True, "KEY_MASK": True, "ROW_MASK": True}
CAPS = {"CAP_S": True, "CAP_T": True}
KERNELS = {
    "forward": attention_forward.attention_forward_kernel,
    "dq": attention_backward.attention_dq_kernel,
    "dk": attention_backward.attention_dk_kernel,
    "rows": rows.token_loss_kernel,
    "eval": linear_eval.linear_eval_kernel,
}


def attention_cases(arch: str) -> Iterator[Case]:
    """Per tile of the table, the options that need most registers among those that select it."""
    for kernel in ("forward", "dq", "dk"):
        for dim in (64, 128, 256):
            plain = MASKS | {"D": dim, "REVERSE": True}
            heavy = MASKS | CAPS | {"D": dim * 5 // 8, "G": 3, "FIXED": False, "REVERSE": True}
            single = MASKS | CAPS | {"D": dim, "FIXED": False, "REVERSE": True}
            sets = [("bf16", plain, True), ("bf16", heavy, False)]
            if kernel == "dq":
                sets.append(("bf16", MASKS | {"D": dim, "EMIT": True}, True))
            if dim == 128:
                sets += [("bf16", {"D": dim}, True), ("bf16", single, False), ("fp32", {"D": dim}, True)]
            for dtype, options, simple in sets:
                tile = launch.attention_tile(arch, kernel, dim, 4 if dtype == "fp32" else 2, simple)
                constants = dict.fromkeys(("WINDOW", "SEGMENTS", "KEY_MASK", "ROW_MASK", "CAP_S", "CAP_T"), False)
                constants |= {"G": 1, "QS": 4, "QT": 4, "CAUSAL": True, "REVERSE": False, "EMIT": False, "FIXED": True}
                constants |= {"BLOCK_DS": dim, "BLOCK_DT": dim}
                constants |= {"UPCAST": False, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n} | options
                constants |= {"DS": constants["D"], "DT": constants["D"]}
                pointers = dict.fromkeys(("qs_ptr", "ks_ptr", "qt_ptr", "kt_ptr", "dq_ptr", "dk_ptr"), dtype)
                pointers |= dict.fromkeys(("head_map_ptr", "starts_ptr", "ends_ptr", "blocks_ptr", "ranks_ptr"), "i32")
                pointers |= dict.fromkeys(("key_mask_ptr", "row_mask_ptr"), "u8")
                name = f"{kernel} {dtype} D={constants['D']} {'plain' if simple else 'heavy'} {tuple(tile)}"
                own = {k: v for k, v in constants.items() if k in KERNELS[kernel].arg_names}
                yield Case(name, arch, kernel, pointers, own, tile.warps, tile.stages, dtype == "bf16")


def row_cases(arch: str) -> Iterator[Case]:
    """Plain logits in bf16 (statistics, then gradient) and the chunk of the linear loss with every option."""
    block, warps = launch.row_tile(arch)
    optional = ["teacher_ptr", "student_bias_ptr", "teacher_bias_ptr", "upstream_ptr", "kl_ptr", "ce_ptr", "stats_ptr"]
    optional += ["grad_ptr", "student_cap", "teacher_cap"]
    logits = {"student_ptr": "bf16", "teacher_ptr": "bf16", "labels_ptr": "i64", "grad_ptr": "bf16"}
    heads = logits | {
        "student_ptr": "fp32",
        "teacher_ptr": "fp32",
        "student_bias_ptr": "bf16",
        "teacher_bias_ptr": "bf16",
    }
    head = {"student_bias_ptr", "ce_ptr", "grad_ptr", "student_cap"}
    both = head | {"teacher_ptr", "teacher_bias_ptr", "kl_ptr", "teacher_cap"}
    sets: list[tuple[str, dict[str, str], set[str], set[str]]] = [("linear none", heads, head, {"CE_GRAD"})]
    for kind in ("forward", "reverse", "jsd"):
        gradient = {"teacher_ptr", "stats_ptr", "grad_ptr", "upstream_ptr"}
        sets.append((f"logits {kind}", logits, {"teacher_ptr", "kl_ptr", "stats_ptr"}, set()))
        sets.append((f"logits {kind} gradient", logits, gradient, {"LOAD_STATS"}))
        sets.append((f"linear {kind}", heads, both, {"CE_GRAD"}))
    for name, pointers, given, flags in sets:
        constants: dict[str, Any] = {key: None for key in optional if key not in given}
        constants |= {key: key in flags for key in ("LOAD_STATS", "CE_GRAD")}
        constants |= {"KIND": launch.KINDS[name.split()[1]], "BLOCK": block}
        yield Case(name, arch, "rows", pointers, constants, warps, 3, False)


def eval_cases(arch: str) -> Iterator[Case]:
    for dtype, kind, mixture in (("bf16", "forward", False), ("bf16", "jsd", True), ("fp32", "forward", False)):
        block_m, block_n, block_k, warps, stages = launch.eval_tile(arch, 4 if dtype == "fp32" else 2, not mixture)
        precision = "tf32x3" if dtype == "fp32" and arch.startswith("sm_") else "ieee"
        constants = {"KIND": launch.KINDS[kind], "MIXTURE": mixture, "HAS_LABELS": True, "EVEN_S": True, "EVEN_T": True}
        constants |= dict.fromkeys(("STUDENT_BIAS", "TEACHER_BIAS", "STUDENT_CAP", "TEACHER_CAP"), mixture)
        constants |= {"FIELDS": linear_eval.FIELDS, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
        constants |= {"PRECISION_S": precision, "PRECISION_T": precision, "UPCAST": False}
        pointers = dict.fromkeys(("xs_ptr", "ws_ptr", "bs_ptr", "xt_ptr", "wt_ptr", "bt_ptr"), dtype)
        pointers |= {"order_ptr": "i64", "labels_ptr": "i64"}
        name = f"eval {dtype} {kind} {(block_m, block_n, block_k, warps, stages)}"
        yield Case(name, arch, "eval", pointers, constants, warps, stages, True)


@pytest.mark.parametrize("arch", launch.ARCHITECTURES)
def test_every_tile_compiles_without_spills(arch):
    cases = [*attention_cases(arch), *row_cases(arch), *eval_cases(arch)]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        figures = list(pool.map(compile_case, cases))
    faults = []
    for case, found in zip(cases, figures, strict=True):
        print(f"{arch:7} {case.name:45} {found}")
        tolerated = (
            512 if " fp32 " in f" {case.name} " and arch.startswith("sm_") else SLACK
        )  # fp32 maps: exact, not fast
        if found.spilled > tolerated or found.shared > SHARED[arch] or (case.multiplies and not found.tensor_core):
            faults.append(f"{case.name}: {found}")
    assert not faults, f"{arch}:\n" + "\n".join(faults)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_the_table_and_the_targets_agree(precision):
    import torch

    assert set(TARGETS) == set(launch.ARCHITECTURES)
    names = [arch for arch in TARGETS if launch.precision(arch, torch.float32) == precision]
    assert names == (["gfx942"] if precision == "ieee" else ["sm_80", "sm_90", "sm_100"])
