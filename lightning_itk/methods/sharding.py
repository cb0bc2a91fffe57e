"""What a module with language models does once its strategy is known: shard them, read their weights, prove them."""

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_itk.models.hidden import base_causal_lm, check_head
from lightning_itk.models.offload import host_policy
from lightning_itk.models.precision import reshard
from lightning_itk.models.sharded_loading import read_weights


class ShardingModule(L.LightningModule):
    """A module whose `models` are sharded under FSDP2, and whose weights may come only then (`deferred_loading`)."""

    _unproven: tuple[nn.Module, ...] = ()

    def models(self) -> Iterable[nn.Module]:
        """Every language model of this module: what FSDP2 shards."""
        raise NotImplementedError(f"{type(self).__name__} must say which models it has")

    def configure_model(self) -> None:
        mesh = None if self.device_mesh is None else _data_parallel(self.device_mesh)
        for model in self.models():
            if mesh is not None and not isinstance(model, FSDPModule):
                shard(model, mesh, str(self.trainer.precision))
            if read_weights(model, mesh):
                self._unproven += (model,)

    def on_fit_start(self) -> None:
        self._prove()

    def on_validation_start(self) -> None:
        self._prove()

    def on_test_start(self) -> None:
        self._prove()

    def on_predict_start(self) -> None:
        self._prove()

    def _prove(self) -> None:
        """Check models whose weights came late as others are checked when they are made. On all ranks at once."""
        unproven, self._unproven = self._unproven, ()
        if not unproven:
            return
        with self.trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
            for model in unproven:
                check_head(model)
            self.check_models()
        for model in unproven:
            reshard(model)

    def check_models(self) -> None:
        """What else is proven of models when their weights have come late."""


def _data_parallel(mesh: DeviceMesh) -> DeviceMesh:
    if (size := mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"tensor_parallel_size is {size}, but no model is split that way here: every rank would hold it whole; "
            "set tensor_parallel_size: 1 and data_parallel_size to the number of ranks"
        )
    return mesh["data_parallel"]


def shard(model: nn.Module, mesh: DeviceMesh, precision: str) -> None:
    """Shard a causal LM over the ranks of a mesh with one dimension, by layers (FSDP2).

    Args:
        precision: Lightning's name of it.
    """
    how: dict[str, Any] = {"mesh": mesh}
    if half := {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision):
        # What autocast would do after the weights have travelled in twice the bytes. Its inputs stay: rotary
        # embeddings are fp32.
        how["mp_policy"] = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    for layer in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]:
        fully_shard(layer, **how, **host_policy(model))
    if (embeddings := _own_embeddings(model)) is not None:
        # Else they stay gathered from the first layer's forward to its backward. The head does so in any case: losses
        # read its weight after the forward pass.
        fully_shard(embeddings, **how)
    fully_shard(model, **how)


def _own_embeddings(model: nn.Module) -> nn.Module | None:
    """The input embeddings, unless other layers have a share in them: those of a tied head are needed to the end."""
    found = base_causal_lm(model).get_input_embeddings()
    if type(found).__module__.startswith("peft."):
        return None
    own = {id(parameter) for parameter in found.parameters()}
    inside = {id(module) for module in found.modules()}
    for module in model.modules():
        if id(module) not in inside and any(id(parameter) in own for parameter in module._parameters.values()):
            return None
    return found
