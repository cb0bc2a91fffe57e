"""A frozen model whose decoder layers wait in host memory; a device sees one at a time, and the next on its way."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_MARK = "_itk_offloaded"
_HOST = torch.device("cpu")


class _Copies:
    """Copies on CUDA beside what is computed there. Elsewhere there are no streams: `stream` is None."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, source: list[Tensor], target: list[Tensor]) -> None:
        """Once all that was asked of the device so far is done: that may still read `target`."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):  # None = the current one
            for here, there in zip(source, target, strict=True):
                there.copy_(here, non_blocking=True)

    def arrived(self) -> None:
        """What is asked of the device from now on comes after the copies."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


class LayerStream:
    """Brings each decoder layer of a model to the device of its input, just before it runs, and lets it go after.

    Two places on the device hold the layers by turns. With streams the next layer is copied while one computes; without
    them one place is used at a time. Both are given up when the last layer has run. Where the input is in host memory
    nothing is copied. Weights are copied as they are, so what the model computes does not change.

    Args:
        layers: in the order in which they run; their weights need no gradient.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        self.layers = layers
        # Where each layer's tensors belong: the dict of a module's parameters or buffers, and the name there.
        self._places: list[list[tuple[dict[str, Any], str]]] = []
        for layer in layers:
            stores = [store for module in layer.modules() for store in (module._parameters, module._buffers)]
            self._places.append([(store, name) for store in stores for name, t in store.items() if t is not None])
        self._host: dict[int, list[Tensor]] = {}  # of the layer that runs, what it is made of otherwise
        self._slots: list[list[Tensor]] = [[], []]
        self._copied: int | None = None
        self._copies: _Copies | None = None
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._enter, number), with_kwargs=True)
            layer.register_forward_hook(partial(self._leave, number), always_call=True)
            layer._apply = partial(_stay, layer)  # type: ignore[method-assign]

    def _enter(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        device = next(t.device for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        if device == _HOST or isinstance(layer, FSDPModule):  # which brings its weights itself
            return
        if self._copies is None or self._copies.device != device:
            self._copies, self._slots = _Copies(device), [[], []]
        if self._copied != number:
            self._fetch(number)
        self._copies.arrived()
        self._host[number] = self._tensors(number)
        self._put(number, self._slots[number % 2])
        if self._copies.stream is not None and number + 1 < len(self.layers):
            self._fetch(number + 1)

    def _leave(self, number: int, *_: Any) -> None:
        if number not in self._host:
            return
        self._put(number, self._host.pop(number))
        if self._copies is None or self._copies.stream is None:
            self._slots[number % 2] = []
        if number + 1 == len(self.layers):
            self._slots, self._copied = [[], []], None

    def _fetch(self, number: int) -> None:
        """Start to copy a layer. Its place was last used by the layer before the last, which was asked for already."""
        assert self._copies is not None
        if self._copies.stream is not None:
            self._pin(number)
        host, slot = self._tensors(number), self._slots[number % 2]
        if [(t.shape, t.dtype) for t in host] != [(t.shape, t.dtype) for t in slot]:
            device = self._copies.device
            slot = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) for t in host]
            self._slots[number % 2] = slot
        self._copies.copy(host, slot)
        self._copied = number

    def _pin(self, number: int) -> None:
        """Only from pinned memory are copies made beside what the host does."""
        for tensor in self._tensors(number):
            if not tensor.is_pinned():
                tensor.data = tensor.data.pin_memory()

    def _tensors(self, number: int) -> list[Tensor]:
        return [store[name] for store, name in self._places[number]]

    def _put(self, number: int, tensors: list[Tensor]) -> None:
        for (store, name), tensor in zip(self._places[number], tensors, strict=True):
            wrap = isinstance(store[name], nn.Parameter) and not isinstance(tensor, nn.Parameter)
            store[name] = nn.Parameter(tensor, requires_grad=False) if wrap else tensor


def _stay(layer: nn.Module, move: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module._apply` of a layer that is offloaded: it takes another dtype, but goes to no device."""

    def stay(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return move(tensor).to(_HOST)
        return tensor.to(move(torch.empty(0, dtype=tensor.dtype)).dtype)

    return type(layer)._apply(layer, stay, recurse)


def check_one_device(model: PreTrainedModel, name: str) -> None:
    """Refuse a model that accelerate spread over devices or the disk: Lightning keeps a module on one device.

    Raises:
        ValueError: names the places.
    """
    places = sorted({str(place) for place in getattr(model, "hf_device_map", {}).values()})
    if len(places) > 1 or "disk" in places:
        raise ValueError(
            f"model {name!r}: device_map spreads it over {', '.join(places)}, but the Trainer keeps it on one device; "
            "leave device_map out, and set teacher_offload: true where it does not fit"
        )


def offload_layers(model: PreTrainedModel) -> None:
    """Keep the decoder layers of a frozen model in host memory, whatever device it is moved to; see `LayerStream`.

    Embeddings, last norm and head move with the model. Under FSDP2 (`host_policy`) each rank keeps its shards there.

    Raises:
        ValueError: a model without such layers, or with quantised weights.
    """
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    name = type(model).__name__
    if not layers:
        raise ValueError(f"{name} has no decoder layers that can be offloaded")
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{name}: quantised weights cannot be offloaded; leave out quantization_config or the offload")
    setattr(model, _MARK, LayerStream(layers))


def is_offloaded(model: nn.Module) -> bool:
    """Whether a model's layers wait in host memory."""
    return hasattr(model, _MARK)


def host_policy(model: nn.Module) -> dict[str, Any]:
    """What `fully_shard` is told about the layers of a model that is offloaded; nothing of any other."""
    return {"offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available())} if is_offloaded(model) else {}


def leave_to_host(parent: nn.Module, models: list[nn.Module]) -> None:
    """Tell DDP, which would refuse weights on two devices, to leave the layers of offloaded models alone."""
    layers = {id(layer) for model in models if is_offloaded(model) for layer in getattr(model, _MARK).layers}
    names = [name for name, module in parent.named_modules() if id(module) in layers]
    own = [f"{name}.{key}" for name in names for key in _tensor_names(parent.get_submodule(name))]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(parent, own)


def _tensor_names(layer: nn.Module) -> list[str]:
    return [name for named in (layer.named_parameters, layer.named_buffers) for name, _ in named()]
