"""Attention kernels as machine code, and what it says about their speed; no GPU is needed.

`python tests/machine_code.py` prints the table of `lightning_itk/kernels/README.md`, which the compile test compares.
It stands with the tests because it is made of their cases.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_itk.kernels import attention_backward, attention_forward, attention_fused, launch, linear_eval, rows

TARGETS = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TENSOR_CORE = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), r"mma\.sync"),
    "sm_90": r"wgmma|mma\.sync",
    "sm_100": r"tcgen05\.mma|mma\.sync",
    "gfx942": r"v_mfma",
}
TOOLS = Path(nvidia.__file__).parent / "bin"
DISASSEMBLER = TOOLS / "nvdisasm"


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


def compiled_case(case: Case) -> Any:
    """What the compiler makes of a case, from its cache where that has it."""
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
    return triton.compile(source, target=TARGETS[case.arch], options=options)


def compile_case(case: Case) -> Figures:
    compiled = compiled_case(case)
    if case.arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{k}:\s+(\d+)", text)[1]) for k in ("vgpr_count", "vgpr_spill_count"))  # type: ignore[index]
    else:
        text = compiled.asm["ptx"]
        usage = dissect("cuobjdump", "-res-usage", compiled.asm["cubin"])
        found = {k: int(re.search(rf"{k}:(\d+)", usage)[1]) for k in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
        registers, spilled = found["REG"], found["STACK"] + found["LOCAL"]
    return Figures(registers, spilled, compiled.metadata.shared, len(re.findall(TENSOR_CORE[case.arch], text)))


def dissect(tool: str, option: str, cubin: bytes) -> str:
    """What one of the tools that come with Triton says about machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


KERNELS = {
    "forward": attention_forward.attention_forward_kernel,
    "dq": attention_backward.attention_dq_kernel,
    "dk": attention_backward.attention_dk_kernel,
    "fused": attention_fused.attention_fused_kernel,
    "rows": rows.token_loss_kernel,
    "eval": linear_eval.linear_eval_kernel,
}


def attention_cases(arch: str) -> Iterator[Case]:
    """Per tile of the table, the options that need most registers among those that select it."""
    masks = attention_forward.Mask("*i32", "*i32", "*u8", "*u8", "i32", "i32", True)
    causal = attention_forward.Mask(None, None, None, None, "i32", None, True)
    for kernel in ("forward", "dq", "dk", "fused"):
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
                sets += [("fp32", single, False), *([("bf16", {"D": dim}, True)] if dim == 64 else [])]
            if kernel == "fused":
                sets = [("bf16", {"D": dim}, True), ("bf16", plain, True)]
            for dtype, given, simple in sets:
                sizes = (dim, 4 if dtype == "fp32" else 2, simple)
                if kernel == "fused":
                    fused = launch.fused_tile(arch, *sizes, "mask" not in given)
                    if fused is None:
                        continue
                    tile = fused
                else:
                    tile = launch.attention_tile(arch, kernel, *sizes)
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
                arguments |= {"factor": "fp32", "dq_ptr": f"*{dtype}", "parts_ptr": "*fp32", "dk_ptr": f"*{dtype}"}
                arguments |= {"blocks_ptr": listed, "ranks_ptr": listed, "KIND": launch.KINDS[options["kind"]]}
                arguments |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n} | options
                name = f"{kernel} {dtype} D={options['D']} {'plain' if simple else 'heavy'} {tuple(tile)}"
                yield Case(name, arch, kernel, arguments, tile.warps, tile.stages, dtype != "fp32")


class Processor(NamedTuple):
    """One streaming multiprocessor, from NVIDIA's tables; four schedulers issue one instruction of a warp per cycle."""

    flop: int  # dense bf16 per cycle
    special: int  # exp2 per cycle
    shared: int  # bytes; a program takes 1 KiB more than it asks for
    threads: int
    registers: int = 65536


PROCESSORS = {"sm_80": Processor(2048, 16, 167936, 2048), "sm_90": Processor(4096, 16, 233472, 2048)}
"""Of sm_100 the instruction of the tensor cores does not tell its shape."""


class Loop(NamedTuple):
    """An iteration of a program's inner loop, on a processor of its own."""

    instructions: int  # of a warp
    tensor: float  # cycles of the tensor cores
    special: float  # cycles of the special function units
    issue: float  # cycles of the schedulers
    programs: int  # that a processor holds at a time

    @property
    def serial(self) -> float:
        """Share of the tensor cores' peak where nothing overlaps with them."""
        return self.tensor / (self.tensor + max(self.issue, self.special))

    @property
    def overlapped(self) -> float:
        """The same where everything does."""
        return self.tensor / max(self.tensor, self.issue, self.special)


def loops(text: str) -> list[list[str]]:
    """Opcodes of every innermost loop with products, in the order of the code."""
    code: list[str] = []
    labels: dict[str, int] = {}
    found: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", line):
            target = re.search(r"`\((\.L_\w+)\)", instruction[2]) if instruction[1].startswith("BRA") else None
            if target and target[1] in labels:
                found.append((labels[target[1]], len(code)))
            code.append(instruction[1])
    bodies = [(a, b) for a, b in found if any("MMA." in op for op in code[a : b + 1])]
    inner = [(a, b) for a, b in bodies if not any(a <= c and d < b for c, d in bodies if (c, d) != (a, b))]
    return [code[a : b + 1] for a, b in sorted(set(inner))]


def modelled(case: Case) -> Loop:
    """The loop over the blocks that need no mask: most of a long sequence."""
    figures, processor = compile_case(case), PROCESSORS[case.arch]
    ops = loops(dissect("nvdisasm", "-c", compiled_case(case).asm["cubin"]))[0]
    flop = 0
    for op, count in Counter(ops).items():
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", op):  # of four warps together
            flop += count * 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) * case.warps // 4
        elif op.startswith("HMMA.16816."):
            flop += count * 2 * 16 * 8 * 16 * case.warps
    lanes = 32 * case.warps
    held = (
        processor.registers // (-(-figures.registers // 8) * 8 * lanes),
        processor.shared // (figures.shared + 1024),
        processor.threads // lanes,
    )
    special = sum(op.startswith("MUFU") for op in ops) * lanes / processor.special
    return Loop(len(ops), flop / processor.flop, special, len(ops) * case.warps / 4, min(held))


def plain_cases(arch: str) -> Iterator[Case]:
    """bf16, causal, nothing else: the problem that the table is about."""
    for case in attention_cases(arch):
        student, mask = case.arguments["student"], case.arguments["mask"]
        if "bf16" in case.name and "plain" in case.name and mask.rows is None and student.D in (64, 128):
            yield case


def table() -> list[str]:
    """Rows of the table in `lightning_itk/kernels/README.md`."""
    lines = [
        "| card | kernel, head dim | queries x keys, warps, stages | instructions | tensor / exp2 / issue cycles "
        "| registers | shared KiB | programs | KiB read | share of peak, serial to overlapped |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arch in PROCESSORS:
        for case in plain_cases(arch):
            figures, loop = compile_case(case), modelled(case)
            dim, m, n = (case.arguments["student"].D, case.arguments["BLOCK_M"], case.arguments["BLOCK_N"])
            read = (n if case.kernel in ("forward", "dq") else m) * dim * 2 * 2 // 1024
            if case.kernel == "fused":
                read += m * dim * 4 * 2 // 1024  # dq, read and written
            cycles = f"{loop.tensor:.0f} / {loop.special:.0f} / {loop.issue:.0f}"
            lines.append(
                f"| {arch} | {case.kernel}, {dim} | {m} x {n}, {case.warps}, {case.stages} | {loop.instructions} "
                f"| {cycles} | {figures.registers} | {figures.shared // 1024} | {loop.programs} | {read} "
                f"| {loop.serial:.0%} to {loop.overlapped:.0%} |"
            )
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
