"""Live bytes of a step, by what they are for and by the moment of the step; its FLOPs and memory traffic on the way."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import unique
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.distributed._tools.mem_tracker import MemTracker, _RefType
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_GATHER, _SCATTER = torch.ops.c10d._allgather_base_.default, torch.ops.c10d._reduce_scatter_base_.default
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"  # flop_registry lacks the CPU's


@unique
class Part(_RefType):
    """What live bytes are for."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    TEACHER = "teacher"
    LOSS = "loss scratch"


class StepTracker(MemTracker):
    """torch's MemTracker with the parts and moments of an optimizer step in place of modules.

    Attributes:
        part: what is allocated now is for this.
        moment: the part of the step that runs now; "" = none that counts.
        peaks: by moment the largest sum of live bytes, by part. Of the rank, on all devices.
        flops: floating-point operations of products and attention, while a moment is named.
        traffic: bytes that all operations read and write.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ref_class = Part
        self.part, self.moment = Part.ACTIVATIONS, ""
        self.peaks: dict[str, dict[str, int]] = {}
        self.flops = self.traffic = 0

    def mark(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Say what tensors are for; those that are not known yet are taken in."""
        for tensor in tensors:
            self._update_and_maybe_create_winfos(tensor, part)

    @contextmanager
    def allocating(self, part: Part) -> Iterator[None]:
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def worked(self, flops: int, *tensors: Tensor) -> None:
        """Count an operation that is not run, with the tensors that it reads or writes."""
        if self.moment:
            self.flops += flops
            self.traffic += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def live(self) -> dict[str, int]:
        """Live bytes now, by part."""
        return {part.value: sum(s.get(part, 0) for s in self._curr_mem_snap.values()) for part in Part}

    def __enter__(self) -> "StepTracker":
        self._fake_mode_on_entry = active_fake_mode()
        self._track_resize()
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *args: Any) -> None:
        self._restore_resize()
        TorchDispatchMode.__exit__(self, *args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        fake = active_fake_mode()
        if func is torch.ops.aten._local_scalar_dense.default and fake:
            return 1.0 if args[0].is_floating_point() else 1  # any number will do
        waits = fake and func is torch.ops._c10d_functional.wait_tensor.default  # makes no tensor in eager mode
        if waits:
            result = args[0]
        elif fake and func is torch.ops.aten._grouped_mm.default:
            result = _grouped(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if fake is not self._fake_mode_on_entry:
            return result  # DTensor finds out about shapes
        gathered = self.part if self.part is Part.TEACHER else Part.WEIGHTS
        if func is _GATHER:
            self.mark([args[0]], gathered)
        elif func is _SCATTER:
            self.mark([args[1]], Part.GRADIENTS)
        elif func.namespace == "fsdp" and "out" in kwargs:
            self.mark(kwargs["out"], gathered)
        tree_map_only(Tensor, partial(self._track, self.part), result)
        if self.moment:
            self._count(func, args, kwargs, result)
            self._look()
        return result

    def _look(self) -> None:
        total = sum(snap["Total"] for snap in self._curr_mem_snap.values())
        if total > sum(self.peaks.get(self.moment, {}).values()):
            self.peaks[self.moment] = self.live()

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif packet is torch.ops.aten.addmm_:  # flop_registry knows addmm
            self.flops += 2 * args[1].numel() * args[2].shape[-1]
        elif "grouped_mm" in packet.__name__:  # experts: each token meets its own
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        elif packet.__name__ == _ATTENTION:
            self.flops += sdpa_flop_count(*(t.shape for t in args[:3]))
        elif packet.__name__ == f"{_ATTENTION}_backward":
            self.flops += sdpa_backward_flop_count(*(t.shape for t in args[:4]))
        if func.namespace == "aten" and not func.is_view and packet.__name__ not in ("empty", "detach", "empty_like"):
            for tensor in tree_leaves((args, kwargs, result)):
                if isinstance(tensor, Tensor):
                    self.traffic += tensor.numel() * tensor.element_size()


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """What a product of each group's tokens with its own weights returns; fake CPUs know it in bf16 only."""
    if b.ndim == 3:
        return a.new_empty(*a.shape[:-1], b.shape[2])
    groups = offs.numel() if offs is not None else 1
    return a.new_empty(groups, a.shape[0], b.shape[1])
