"""How training walks its tokens: so many rows of logits at a time, and how long their gradient lives."""

from typing import NamedTuple

import triton


class ChunkPlan(NamedTuple):
    """Chunks of N tokens, with fp32 logits and their gradient (dlogits, in the hidden dtype) for [rows, V] at a time.

    The head's gradient dW is dlogitsᵀ [V, N] @ hidden [N, H]. Either all dlogits are kept, and dX and dW are one GEMM
    each; or every chunk overwrites the dlogits of the one before, and dW is summed in an fp32 [V, H] accumulator.

    Example: N = 8192, V = 128,256, a teacher, bf16, at most 2 GiB.
        H = 4096: all dlogits, N · V · 2 bytes = 2.1 GB, are no larger than the accumulator, V · H · 4 bytes: they are
            kept, beside the 2 GiB. Two logits are 8 bytes per column, so 2092 tokens fit: 4 chunks of 2048.
        H = 2048: the accumulator is 1.05 GB and all dlogits are more than half of 2 GiB: they are not kept. With the
            chunk's dlogits it is 10 bytes per column, so 1674 tokens fit: 5 chunks of 1664, of which the last has 1536.
        Frozen head: no accumulator and nothing to keep, whatever H is: the chunks of H = 2048.
    """

    rows: int  # tokens per chunk: a multiple of 128, or all N
    columns: int  # V padded to a multiple of 16: aligned rows, so that GEMMs and the row kernel use wide accesses
    keep_dlogits: bool


def plan_chunks(
    n: int, v: int, width: int, itemsize: int, *, teacher: bool, trains_head: bool, max_scratch_bytes: int
) -> ChunkPlan:
    """The fewest chunks within the bound, equally large; 128 tokens are always allowed. `width` is H."""
    dlogits, accumulator = n * v * itemsize, v * width * 4
    keep = trains_head and dlogits <= max(accumulator, max_scratch_bytes // 2)
    budget = max_scratch_bytes - (dlogits if keep and dlogits > accumulator else 0)
    columns = triton.cdiv(v, 16) * 16
    row_bytes = columns * (4 + 4 * teacher + (0 if keep else itemsize))
    chunks = triton.cdiv(n, max(128, budget // row_bytes // 128 * 128))
    return ChunkPlan(min(n, triton.cdiv(n, chunks * 128) * 128), columns, keep)
