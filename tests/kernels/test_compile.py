"""Every kernel with every shipped tile goes through the real compiler for its architectures, without a GPU.

Asserted from the machine code: no register spills, shared memory within the device's limit, tensor-core instructions.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
import machine_code
import triton
from machine_code import TARGETS, Case, attention_cases, compile_case

from lightning_itk.kernels import launch, linear_eval

pytestmark = pytest.mark.skipif(launch.INTERPRET, reason="the compiler needs a process without TRITON_INTERPRET")

# The tiles were chosen with Triton 3.7; 3.6 spills up to 40 bytes in three of the heaviest sets of options.
SLACK = 64 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 0
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes one program may use
SHARED |= dict.fromkeys(("sm_86", "sm_89", "sm_120"), 101376)


def row_cases(arch: str) -> Iterator[Case]:
    """Plain logits in bf16 (statistics, then gradient) and the chunk of the linear loss with every option."""
    block, warps = launch.row_tile(arch)
    pointers = {"student_ptr": "*bf16", "teacher_ptr": "*bf16", "labels_ptr": "*i64", "grad_ptr": "*bf16"}
    pointers |= dict.fromkeys(("upstream_ptr", "kl_ptr", "ce_ptr", "stats_ptr"), "*fp32")
    pointers |= {"student_bias_ptr": "*bf16", "teacher_bias_ptr": "*bf16", "student_cap": "fp32", "teacher_cap": "fp32"}
    scalars = ("student_scale", "teacher_scale", "temperature", "beta", "kl_weight", "ce_weight")
    sizes = ("student_stride", "teacher_stride", "grad_stride", "upstream_stride", "readable", "grad_v")
    head = {"student_ptr", "labels_ptr", "student_bias_ptr", "ce_ptr", "grad_ptr", "student_cap"}
    both = head | {"teacher_ptr", "teacher_bias_ptr", "kl_ptr", "teacher_cap"}
    logits = {"student_ptr", "teacher_ptr", "labels_ptr", "stats_ptr"}
    sets = [("linear none", head, {"CE_GRAD"})]
    for kind in ("forward", "reverse", "jsd"):
        sets.append((f"logits {kind}", logits | {"kl_ptr"}, set()))
        sets.append((f"logits {kind} gradient", logits | {"grad_ptr", "upstream_ptr"}, {"LOAD_STATS"}))
        sets.append((f"linear {kind}", both, {"CE_GRAD"}))
    for name, given, flags in sets:
        arguments: dict[str, Any] = {key: value if key in given else None for key, value in pointers.items()}
        if name.startswith("linear"):
            arguments |= {key: "*fp32" for key in ("student_ptr", "teacher_ptr") if key in given}
        arguments |= dict.fromkeys(scalars, "fp32") | dict.fromkeys(sizes, "stride") | {"v": "i32"}
        arguments |= {key: key in flags for key in ("LOAD_STATS", "CE_GRAD")}
        arguments |= {"KIND": launch.KINDS[name.split()[1]], "BLOCK": block}
        yield Case(name, arch, "rows", arguments, warps, 3, False)


def eval_cases(arch: str) -> Iterator[Case]:
    for dtype, kind, mixture in (("bf16", "forward", False), ("bf16", "jsd", True), ("fp32", "forward", False)):
        block_m, block_n, block_k, warps, stages = launch.eval_tile(arch, 4 if dtype == "fp32" else 2, not mixture)
        precision = "tf32x3" if dtype == "fp32" and arch.startswith("sm_") else "ieee"
        x, bias, cap = f"*{dtype}", f"*{dtype}" if mixture else None, "fp32" if mixture else None
        head = linear_eval.EvalHead(x, x, bias, "stride", "stride", "stride", "fp32", cap, True, precision)
        arguments = {"student": head, "teacher": head, "order_ptr": "*i64", "labels_ptr": "*i64", "out_ptr": "*fp32"}
        arguments |= {"stats_ptr": "*fp32" if mixture else None, "n": "i32", "v": "i32", "tiles_per_split": "i32"}
        arguments |= {"temperature": "fp32", "beta": "fp32", "KIND": launch.KINDS[kind]}
        arguments |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
        name = f"eval {dtype} {kind} {(block_m, block_n, block_k, warps, stages)}"
        yield Case(name, arch, "eval", arguments, warps, stages, True)


@pytest.mark.parametrize("arch", launch.ARCHITECTURES)
def test_every_tile_compiles_without_spills(arch):
    cases = [*attention_cases(arch), *row_cases(arch), *eval_cases(arch)]
    if arch == "sm_89":  # the code of sm_86, to the register: the largest tiles are enough
        cases = [case for case in cases if case.arguments.get("D", 0) > 128 or case.kernel == "eval"]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        figures = list(pool.map(compile_case, cases))
    faults = []
    for case, found in zip(cases, figures, strict=True):
        print(f"{arch:7} {case.name:45} {found}")
        if found.spilled > SLACK or found.shared > SHARED[arch] or (case.multiplies and not found.tensor_core):
            faults.append(f"{case.name}: {found}")
    assert not faults, f"{arch}:\n" + "\n".join(faults)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_the_table_and_the_targets_agree(precision):
    import torch

    assert set(TARGETS) == set(launch.ARCHITECTURES)
    names = [arch for arch in TARGETS if launch.precision(arch, torch.float32) == precision]
    assert names == (["gfx942"] if precision == "ieee" else [a for a in TARGETS if a != "gfx942"])


INSTRUCTIONS = {
    ("sm_80", "forward, 64"): 597,
    ("sm_80", "forward, 128"): 748,
    ("sm_80", "dq, 64"): 225,
    ("sm_80", "dq, 128"): 374,
    ("sm_80", "dk, 64"): 689,
    ("sm_80", "dk, 128"): 489,
    ("sm_80", "fused, 64"): 972,
    ("sm_80", "fused, 128"): 830,
    ("sm_90", "forward, 64"): 545,
    ("sm_90", "forward, 128"): 621,
    ("sm_90", "dq, 64"): 331,
    ("sm_90", "dq, 128"): 393,
    ("sm_90", "dk, 64"): 581,
    ("sm_90", "dk, 128"): 647,
    ("sm_90", "fused, 64"): 730,
    ("sm_90", "fused, 128"): 972,
}
"""Of a warp in an iteration of the inner loop, as the README has them; more than a tenth more is a fault."""
README = Path(launch.__file__).with_name("README.md")


@pytest.mark.skipif(not machine_code.DISASSEMBLER.exists(), reason="this Triton comes without nvdisasm")
@pytest.mark.skipif(not triton.__version__.startswith("3.7.1"), reason="the README's figures are of Triton 3.7.1")
def test_the_readme_says_what_the_machine_code_does():
    """Else: put what `python tests/machine_code.py` prints there, and say why it is no slower."""
    lines = machine_code.table()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines[2:]]
    slower = [row for row in cells if int(row[4]) > 1.1 * INSTRUCTIONS[row[1], row[2]]]
    assert not slower
    assert "\n".join(lines) in README.read_text()
