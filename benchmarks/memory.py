"""Peak memory: of a call beyond what was allocated before it, and of a whole process."""

import resource
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive among those made inside this context, and their peak.

    Scratch memory inside a single operator is not seen; on a GPU the caching allocator's own counter is used instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), before)
        return result

    def _add(self, storage: Any, before: set[int]) -> None:
        key = id(storage)
        if key in self._known or key in before:
            return
        size = storage.nbytes()

        def forget(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


def peak_mib(action: Callable[[], Any], device: str) -> float:
    """Incremental peak memory of one call, in MiB."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = action()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as counter:
            kept = action()
        peak = counter.peak
    del kept
    return peak / 2**20


def process_mib(line: str) -> float:
    """A line of /proc/self/status: VmRSS, what this process holds now; VmHWM, the most it has held.

    The peak that getrusage knows begins at what the parent process held. It is what there is where there is no /proc.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(found.split()[1]) / 2**10 for found in lines if found.startswith(line))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
