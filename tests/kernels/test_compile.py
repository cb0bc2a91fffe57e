"""Every kernel with every shipped tile goes through the real compiler for its architectures, without a GPU.

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
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The tiles were chosen with Triton 3.7; 3.6 spills up to 40 bytes in three of the heaviest sets of options.
SLACK = 64 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 0
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes one program may use
SHARED |= dict.fromkeys(("sm_86", "sm_89", "sm_120"), 101376)
TENSOR_CORE = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), r"mma\.sync"),
    "sm_90": r"wgmma|mma\.sync",
    "sm_100": r"tcgen05\.mma|mma\.sync",
    "gfx942": r"v_mfma",
}


class Case(NamedTuple):
    """One compilation: the kernel, its arguments and its launch options.

    An argument is the type that Triton gives it ("*bf16", "fp32", "i32"; "stride" for an i32 that is a multiple of 16,
    as strides and widths are in practice), a tuple of arguments, or else a constant.
    """

    name: str
    arch: str
    kernel: str
    arguments: dict[str, Any]
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
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def declare(argument: Any, path: tuple[int, ...]) -> Any:
        if isinstance(argument, tuple):
            parts = [declare(part, (*path, i)) for i, part in enumerate(argument)]
            return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
        if not isinstance(argument, str) or argument in ("ieee", "tf32x3"):
            constants[path] = argument
            return "constexpr"
        if argument == "stride" or argument.startswith("*"):
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if argument == "stride" else argument

    signature = {name: declare(case.arguments[name], (i,)) for i, name in enumerate(kernel.arg_names)}
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


KERNELS = {
    "forward": attention_forward.attention_forward_kernel,
    "dq": attention_backward.attention_dq_kernel,
    "dk": attention_backward.attention_dk_kernel,
    "rows": rows.token_loss_kernel,
    "eval": linear_eval.linear_eval_kernel,
}


def attention_cases(arch: str) -> Iterator[Case]:
    """Per tile of the table, the options that need most registers among those that select it."""
    masks = attention_forward.Mask("*i32", "*i32", "*u8", "*u8", "i32", "i32", True)
    causal = attention_forward.Mask(None, None, None, None, "i32", None, True)
    for kernel in ("forward", "dq", "dk"):
        for dim in (64, 128, 256):
            plain = {"mask": masks, "D": dim, "kind": "reverse"}
            single = plain | {"cap": "fp32", "FIXED": False}
            heavy = single | {"D": dim * 5 // 8, "G": 3}
            sets: list[tuple[str, dict[str, Any], bool]] = [("bf16", plain, True), ("bf16", heavy, False)]
            if kernel == "dq":
                sets.append(("bf16", {"mask": masks, "D": dim, "upstream_ptr": None}, True))
            if dim == 128:
                sets += [("bf16", {"D": dim}, True), ("bf16", single, False)]
                # What two models in different dtypes come to: one size is cast up, bf16 meets fp16 as it is.
                sets += [("fp32", plain, True), ("fp32", single, False), ("fp16", single, False)]
            else:
                sets.append(("fp32", single, False))
            for dtype, given, simple in sets:
                tile = launch.attention_tile(arch, kernel, dim, 4 if dtype == "fp32" else 2, simple)
                options = {"mask": causal, "cap": None, "kind": "forward", "G": 1, "FIXED": True} | given
                strides, scalars = ("stride",) * 3, ("fp32", options["cap"], 4, options["D"], dim)
                model = attention_forward.Model(f"*{dtype}", f"*{dtype}", strides, strides, *scalars)
                other = model._replace(q="*bf16", k="*bf16") if dtype == "fp16" else model
                listed = None if options["mask"].rows is None else "*i32"
                arguments = dict.fromkeys(("kl_ptr", "lse_s_ptr", "lse_t_ptr", "upstream_ptr"), "*fp32")
                arguments |= {
                    "student": model,
                    "teacher": other,
                    "head_map_ptr": "*i32",
                    "unit": "fp32",
                    "to_log2": "fp32",
                }
                arguments |= {"factor": "fp32", "dq_ptr": f"*{dtype}", "dk_ptr": f"*{dtype}"}
                arguments |= {"blocks_ptr": listed, "ranks_ptr": listed, "KIND": launch.KINDS[options["kind"]]}
                arguments |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n} | options
                name = f"{kernel} {dtype} D={options['D']} {'plain' if simple else 'heavy'} {tuple(tile)}"
                yield Case(name, arch, kernel, arguments, tile.warps, tile.stages, dtype != "fp32")


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
