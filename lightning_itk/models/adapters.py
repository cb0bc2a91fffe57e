"""Adapters merged into their model layer by layer, by peft's own hands, so that it is never in memory as a whole."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from lightning_itk.models.hidden import base_causal_lm
from lightning_itk.models.saved import SavedModel, empty
from lightning_itk.models.weights import ModelFiles, Weights

_PREFIX = "base_model.model."  # of everything in peft's wrapper


def empty_twin(student: torch.nn.Module) -> torch.nn.Module:
    """A model with adapters, sharded or not, again, with all its weights on the meta device."""
    from peft import get_peft_model

    base = base_causal_lm(student)
    dtypes = {name: tensor.dtype for name, tensor in student.named_parameters()}
    with torch.device("meta"):
        whole = type(base)(copy.deepcopy(base.config))
        twin = get_peft_model(whole, student.peft_config["default"])  # type: ignore[index, arg-type]
    whole.generation_config = copy.deepcopy(base.generation_config)
    if hasattr(base, "_weight_conversions"):
        whole._weight_conversions = base._weight_conversions
    for name, parameter in twin.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return twin


def merged_twin(twin: torch.nn.Module) -> PreTrainedModel:
    """What becomes of a model with adapters on the meta device once they are merged."""
    whole: PreTrainedModel = copy.deepcopy(twin).merge_and_unload()  # type: ignore[operator]
    ends = whole.get_input_embeddings(), whole.get_output_embeddings()
    if (
        getattr(whole.config, "tie_word_embeddings", False)
        and None not in ends
        and ends[0].weight is not ends[1].weight
    ):
        whole.config.tie_word_embeddings = False  # as peft does, which cannot see it on the meta device
    return whole


class MergedAdapters(Weights):
    """The weights of a model with its adapters merged.

    Args:
        twin: the model with adapters, on the meta device.
        trained: where its adapters are, by the names that they have in `twin`.
        base: where the weights are that `trained` lacks.
    """

    def __init__(self, twin: torch.nn.Module, trained: Weights, base: Weights | None = None) -> None:
        self.trained, self.base = trained, base
        self.layers: dict[str, Any] = {}
        self.places: dict[str, str] = {}  # a weight of the merged model -> the layer that has it
        for path, module in base_causal_lm(twin).named_modules():
            inside = any(path.startswith(f"{layer}.") for layer in self.layers)
            if not inside and (hasattr(module, "base_layer") or hasattr(module, "modules_to_save")):
                self.layers[path] = module
                self.places |= {f"{path}.{name}": path for name in _unloaded(module, merge=False).state_dict()}

    def __contains__(self, name: object) -> bool:
        return self.changes(str(name)) or (self.base is not None and name in self.base)

    def changes(self, name: str) -> bool:
        """Whether training may have changed a weight."""
        return name in self.places or f"{_PREFIX}{name}" in self.trained

    def replaces(self, name: str) -> bool:
        """Whether a weight was trained in full, so that its value before is of no use."""
        layer = self.layers.get(self.places.get(name, ""))
        return f"{_PREFIX}{name}" in self.trained or (layer is not None and not hasattr(layer, "base_layer"))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in names:
            if name in self.places:
                if name not in found:
                    found |= self._merged(self.places[name])
            else:
                found[name] = self._tensor(f"{_PREFIX}{name}", name)
        return found

    def stored(self, name: str) -> Tensor | None:
        return self.base.stored(name) if self.base is not None else None

    def _tensor(self, name: str, base_name: str) -> Tensor:
        if name in self.trained:
            return self.trained.read([name])[name]
        assert self.base is not None
        return self.base.read([base_name])[base_name]

    @torch.no_grad()
    def _merged(self, path: str) -> dict[str, Tensor]:
        layer = copy.deepcopy(self.layers[path])
        state = {}
        for name, own in layer.state_dict().items():
            kept = name.startswith("original_module.")  # beside the copy of it that was trained
            if not kept:
                base_name = f"{path}.{name.rpartition('base_layer.')[2]}"  # one in another where it has several weights
                state[name] = self._tensor(f"{_PREFIX}{path}.{name}", base_name).to(own.dtype, copy=True)
        layer.load_state_dict(state, strict=False, assign=True)
        return {f"{path}.{name}": tensor for name, tensor in _unloaded(layer, merge=True).state_dict().items()}


def _unloaded(layer: Any, *, merge: bool) -> torch.nn.Module:
    """What becomes of one of peft's layers when adapters are merged, or thrown away; as in `merge_and_unload`."""
    if hasattr(layer, "unload_and_optionally_merge_module"):  # some lie in others of their kind
        return layer.unload_and_optionally_merge_module(merge=merge, safe_merge=False, adapter_names=None)
    if merge:
        layer.merge()
    return layer.get_base_layer()


class BaseFiles(Weights):
    """The weights that a model with adapters began with, out of its files: those that training leaves alone in the form
    that they have there, the others in the model's, which transformers makes of as few tensors as it needs.

    Args:
        name: folder or hub name.
        saved: the merged model.
        merged: its weights, which go without a base so far.

    Raises:
        ValueError: there are no safetensors, or not with what is needed; says what is in the way.
    """

    def __init__(self, name: str, saved: SavedModel, merged: MergedAdapters) -> None:
        self.files = ModelFiles(name)
        self.changed = {tensor for tensor, weights in saved.sources.items() if any(map(merged.changes, weights))}
        self.sources: dict[str, list[str]] = {}  # a weight -> the tensors of the files that it is made of
        for tensor, weights in saved.sources.items():
            for weight in weights:
                self.sources.setdefault(weight, []).append(tensor)
        self.plain = {weight: tensor for tensor, weight in saved.plain.items()}
        self.model = copy.deepcopy(saved.model)
        needed = [name for name, weights in saved.sources.items() if not all(map(merged.replaces, weights))]
        lost = [name for name in needed if self.files.shapes.get(name) != tuple(saved.tensors[name].shape)]
        made = [weight for weight in self.sources if weight not in self.plain and merged.changes(weight)]
        try:
            self.read(made[:1])
        except Exception:  # transformers of another version; the caller has another way
            lost += made[:1]
        if lost or (made and saved.whole):
            raise ValueError(f"the files of {name} hold {(lost or made)[0]} in another form")

    def __contains__(self, name: object) -> bool:
        return name in self.sources

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._plain(name) if name in self.plain else self._made(name) for name in names}

    def stored(self, name: str) -> Tensor | None:
        return None if name in self.changed else self.files.read([name])[name]

    def _plain(self, name: str) -> Tensor:
        return self.files.read([self.plain[name]])[self.plain[name]]

    def _made(self, name: str) -> Tensor:
        how = LoadStateDictConfig(weight_mapping=copy.deepcopy(getattr(self.model, "_weight_conversions", None)))
        try:
            convert_and_load_state_dict_in_model(self.model, self.files.read(self.sources[name]), how, None)
            return self.model.get_parameter(name).detach()
        finally:
            for key, loaded in [(key, p) for key, p in self.model.named_parameters() if not p.is_meta]:
                parent, _, last = key.rpartition(".")
                again = torch.nn.Parameter(empty(loaded, loaded.dtype), requires_grad=False)
                self.model.get_submodule(parent).register_parameter(last, again)
