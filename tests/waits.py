"""A device that is none: tensors that say they live on one, so that a CPU can count what a host would wait for there.

The numbers lie in plain CPU tensors. What reads them on the host (`item`, `tolist`, `cpu`, `bool`), what must know them
to give its result a shape (`nonzero`, a boolean index, `unique`, `repeat_interleave`), and what copies from the host
without `non_blocking` makes the host wait; everything else is only queued.
"""

import traceback
from collections import Counter
from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

NAME = "lazy"  # a name that torch accepts and does not try to start
_aten = torch.ops.aten
_WAITING = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.bincount.default,
}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._unsafe_index.Tensor}


class Away(torch.Tensor):
    """A tensor of the device. C++ takes it for one of the meta device, which needs no kernels of its own."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "Away":
        away = torch.Tensor._make_wrapper_subclass(
            cls, here.size(), here.stride(), here.storage_offset(), dtype=here.dtype, device="meta"
        )
        away.here = here.detach()
        return away

    def new_tensor(self, data, **kwargs) -> "Away":
        """From numbers of the host: without this, C++ would make an empty tensor of the meta device."""
        mode = _get_current_dispatch_mode()
        if isinstance(mode, Waits):
            mode.places[f"new_tensor {_place()}"] += 1
        return Away(torch.tensor(data, dtype=kwargs.get("dtype", self.dtype)))

    def tolist(self) -> list:
        return self.cpu().tolist()

    @property
    def device(self) -> torch.device:
        return torch.device(NAME)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return Waits().__torch_dispatch__(function, types, args, kwargs)


def _is_here(value) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, Away)


class Waits(TorchDispatchMode):
    """Counts by place in the package; runs what is asked of `Away` tensors on the numbers behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __enter__(self):
        # Autocast knows a fixed list of devices.
        self._own = torch.autocast, torch.is_autocast_enabled
        autocast, enabled = self._own
        torch.autocast = lambda kind, *args, **options: (
            nullcontext() if kind == NAME else autocast(kind, *args, **options)
        )
        torch.is_autocast_enabled = lambda *kind: kind != (NAME,) and enabled(*kind)
        return super().__enter__()

    def __exit__(self, *error):
        torch.autocast, torch.is_autocast_enabled = self._own
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves, _ = tree_flatten((args, kwargs))
        away = any(isinstance(leaf, Away) for leaf in leaves)
        target = kwargs.get("device")
        blank = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta"]
        assert not blank, f"{function} got a tensor that was made behind our back"
        leave = target is not None and torch.device(target).type not in ("meta", NAME)
        arrive = target is not None and not leave
        if not away and not arrive:
            return function(*args, **kwargs)
        self._look(function, args, kwargs, leaves, leave)
        args_here, kwargs_here = tree_map_only(Away, lambda tensor: tensor.here, (args, dict(kwargs)))
        if target is not None:
            kwargs_here["device"] = torch.device("cpu")
        result = function(*args_here, **kwargs_here)
        if leave:
            return result
        result = tree_map_only(torch.Tensor, Away, result)
        return return_and_correct_aliasing(function, args, kwargs, result) if away else result

    def _look(self, function, args, kwargs, leaves, leave) -> None:
        copies = function is _aten._to_copy.default
        waits = function in _WAITING or (copies and leave)
        if function is _aten.repeat_interleave.Tensor:
            waits = kwargs.get("output_size") is None
        if function in _INDEXING:
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        # From the host: a copy, or an operation that copies a tensor of more than one number for itself.
        from_here = any(_is_here(leaf) and leaf.dim() for leaf in leaves)
        queued = kwargs.get("non_blocking") or (function is _aten.copy_.default and args[2:3] == (True,))
        if from_here and not leave and not queued:
            waits = True
        if waits:
            self.places[f"{function} {_place()}"] += 1


def _place() -> str:
    """The innermost line of the kit or of transformers, as "lightning_itk/FILE:LINE"."""
    for frame in reversed(traceback.extract_stack()):
        for package in ("lightning_itk/", "transformers/"):
            if f"/{package}" in frame.filename:
                return f"{package}{frame.filename.rpartition(package)[2]}:{frame.lineno}"
    return "elsewhere"


def send(value):
    """Tensors to the device; a module's parameters and buffers in place."""
    if isinstance(value, torch.Tensor):
        return Away(value)
    if isinstance(value, dict):
        return {key: send(item) for key, item in value.items()}
    if isinstance(value, torch.nn.Module):
        seen: dict[int, torch.nn.Parameter] = {}
        for module in value.modules():
            for name, tensor in list(module._parameters.items()):
                if tensor is not None:
                    if id(tensor) not in seen:
                        seen[id(tensor)] = torch.nn.Parameter(Away(tensor), requires_grad=tensor.requires_grad)
                    module._parameters[name] = seen[id(tensor)]
            for name, tensor in list(module._buffers.items()):
                if tensor is not None:
                    module._buffers[name] = Away(tensor)
    return value
