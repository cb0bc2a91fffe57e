"""What is fuzzed."""

import os

from fuzz import comparison, configs, files, records, samplers, tensors
from fuzz.engine import Kind

KINDS = {
    kind.name: kind
    for kind in (
        Kind("records", records.case),
        Kind("files", files.case),
        Kind("configs", configs.case, batch=10, least=10),
        Kind("tensors", tensors.case),
        Kind("samplers", samplers.case),
    )
}
TRITON = Kind("triton", tensors.case, batch=10, least=10)
"""The losses' kernels in Triton's interpreter, for a process that was started with TRITON_INTERPRET=1."""

if os.environ.get("TRITON_INTERPRET") == "1":
    comparison.IMPL = "triton"
    KINDS = {TRITON.name: TRITON}
