"""What a checkpoint holds: the trained tensors, plain hyper-parameters, the random state of every rank."""

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_itk.models.sharded import ShardedTensors, open_sharded, read_sharded


def keep_out_of_checkpoints(module: nn.Module, *, frozen_only: bool = False) -> None:
    """Leave a module's tensors out of every state dict, and let strict loading pass without them.

    Args:
        module: what to hide.
        frozen_only: hide only parameters that need no gradient (the base model under adapters).
    """

    def hidden() -> dict[str, Tensor]:
        parameters = module.named_parameters(remove_duplicate=False)  # a tied weight has two names
        tensors = {name: p.detach() for name, p in parameters if not (frozen_only and p.requires_grad)}
        if not frozen_only:
            tensors |= _persistent_buffers(module)
        return tensors

    def drop(_: nn.Module, state: dict[str, Tensor], prefix: str, __: dict) -> None:
        for name in hidden():
            state.pop(prefix + name, None)

    def fill(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
        for name, tensor in hidden().items():
            state.setdefault(prefix + name, tensor)

    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_pre_hook(fill)


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}" if path else name: buffer
        for path, child in module.named_modules()
        for name, buffer in child.named_buffers(recurse=False)
        if name not in child._non_persistent_buffers_set
    }


def read_checkpoint(path: str | Path, *, lazy: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, as tensors and plain values; no code in it runs. Tensors of a file stay on disk until
    they are used. Those of a folder are read, and with `lazy` each time one is asked for, without the optimizers'.

    Raises:
        ValueError: no such file, or none that a training run of this kit wrote whole.
    """
    if not Path(path).exists():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        if Path(path).is_dir():
            content = open_sharded(path) if lazy else read_sharded(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a reader of damaged bytes may trip over anything
        raise ValueError(f"{path}: is no checkpoint of this kit ({type(error).__name__})") from error
    for name, kind in (("hyper_parameters", dict), ("state_dict", Mapping), ("global_step", int)):
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            raise ValueError(f"{path}: is no checkpoint of this kit (no {name})")
    return content


def shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors, of which none is read."""
    if isinstance(state, ShardedTensors):
        return state.shapes
    return {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, Tensor)}


def rng_state() -> dict[str, Tensor]:
    """The random state of this rank."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def rng_states(state: dict[str, Tensor], world_size: int) -> list[dict[str, Tensor]]:
    """The random state of every rank, from each one's own; called on all of them."""
    if world_size == 1:
        return [state]
    states: list[dict[str, Tensor]] = [{} for _ in range(world_size)]
    torch.distributed.all_gather_object(states, state)
    return states


def set_rng_state(states: list[dict[str, Tensor]], rank: int) -> None:
    """Go on where this rank left off. A rank that did not exist then keeps its fresh state."""
    if rank >= len(states):
        return
    torch.set_rng_state(states[rank]["cpu"].cpu())
    if "cuda" in states[rank] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[rank]["cuda"].cpu())


def plain_hparams(hparams: Any) -> dict[str, Any]:
    """Hyper-parameters without what only pickle could store; dataclasses become dicts."""
    keep: dict[str, Any] = {}
    for name, value in dict(hparams).items():
        value = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        if _is_plain(value):
            keep[name] = str(value) if isinstance(value, Path) else value
    return keep


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool | Path)
