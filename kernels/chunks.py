"""How the linear losses walk their tokens: so many rows of logits at a time, and how long their gradient lives.

The head's gradient dW is dlogitsᵀ [V, N] @ hidden [N, H]. What is summed over chunks must be read and written again for
every chunk, 8 bytes per element of an fp32 [V, H], while dlogits are 2 bytes (bf16) per token and word and rounded in
any case. So dlogits outlive their chunk as far as there is room, and dX and dW are made of many chunks at once:

1. All dlogits are kept where they fit half of the scratch, or are no larger than the accumulator would be. dW is one
   product, there is no accumulator.
2. Else they are kept in the largest equal groups that fit half of the scratch, and dW is summed in an fp32 [V, H]
   accumulator, once per group; the first group writes it. It comes on top of the scratch and is rounded once, at the
   end, to the weight's dtype (fp16: kept until backward has scaled it).
3. A frozen head has no dW: dlogits live for a chunk.
"""

from typing import NamedTuple

import triton


class ChunkPlan(NamedTuple):
    """Chunks of N tokens, with fp32 logits and their gradient (dlogits, in the hidden dtype) for [rows, V] at a time.

    Example: N = 8192, V = 128,256, a teacher, bf16, at most 2 GiB. Two logits are 8 bytes per column.
        H = 4096: all dlogits, N · V · 2 bytes = 2.1 GB, are no larger than the accumulator, V · H · 4 bytes: they are
            kept, beside the 2 GiB, which is 2092 tokens: 4 chunks of 2048.
        H = 2048: the accumulator is 1.05 GB and all dlogits are more than half of 2 GiB. That half keeps 4186 tokens: 2
            groups of 4096. The other half is 1046 tokens of logits: 4 chunks of 1024 in each group.
        Frozen head, whatever H is: with the chunk's dlogits it is 10 bytes per column, so 1674 tokens fit: 5 chunks of
            1664, of which the last has 1536. Without gradients it is 8 again.
    """

    rows: int  # tokens per chunk: a multiple of 128, or all N
    columns: int  # V padded to a multiple of 16: aligned rows, so that GEMMs and the row kernel use wide accesses
    kept: int  # tokens whose dlogits live together: as many as rows, a group of chunks, or all N


def plan_chunks(
    n: int,
    v: int,
    width: int,
    itemsize: int,
    *,
    teacher: bool,
    trains_head: bool,
    max_scratch_bytes: int,
    gradients: bool = True,
) -> ChunkPlan:
    """The fewest groups and chunks within the bound, equally large; 128 tokens are always allowed. `width` is H."""
    columns, half = triton.cdiv(v, 16) * 16, max_scratch_bytes // 2
    dlogits, accumulator = columns * itemsize, v * width * 4  # of one token, of all
    logits, budget = columns * (4 + 4 * teacher), max_scratch_bytes
    kept = 0
    if not gradients:
        pass
    elif not trains_head:
        logits += dlogits
    elif n * dlogits <= max(accumulator, half):
        kept = n
        budget -= n * dlogits if n * dlogits > accumulator else 0
    else:
        kept = _share(n, half // dlogits)
        budget -= kept * dlogits
    rows = _share(kept or n, budget // logits)
    return ChunkPlan(rows, columns, kept or rows)


def _share(n: int, most: int) -> int:
    """Tokens of the fewest equal parts of n that have at most `most`: a multiple of 128, or all n."""
    parts = triton.cdiv(n, max(128, most // 128 * 128))
    return min(n, triton.cdiv(n, parts * 128) * 128)
