"""What `save_pretrained` writes of a model, known from shapes alone and made from a few weights at a time."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from lightning_itk.models.weights import Weights


class SavedModel:
    """The names, shapes and dtypes of a model's files, and which of its weights each tensor comes from.

    transformers keeps some weights in memory in another form than in files (fused experts). It is asked to turn single
    weights, else single layers, else the whole model back; the smallest that gives all that the whole gives is used.

    Args:
        model: a causal LM, without adapters; its weights may be on the meta device, or sharded.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        state = {name: empty(tensor, tensor.dtype) for name, tensor in model.state_dict().items()}
        for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
            state.pop(name, None)
        owners = defaultdict(list)
        for name in state:
            owners[id(model.get_parameter_or_buffer(name))].append(name)
        self.names = {name: names for names in owners.values() for name in names}  # a weight -> all that it is called
        self.weights: dict[str, Tensor] = remove_tied_weights_from_state_dict(state, model)
        self.tensors = {n: empty(t, t.dtype) for n, t in revert_weight_conversion(model, dict(self.weights)).items()}
        self.sources: dict[str, tuple[str, ...]] = {}  # a tensor of the files -> the weights that it is made of
        self.plain: dict[str, str] = {}  # a tensor of the files -> the weight that it is, unchanged
        self.whole = not (self._split(str) or self._split(_layer))
        if self.whole:
            self.plain, self.sources = {}, dict.fromkeys(self.tensors, tuple(self.weights))

    def _split(self, part: Callable[[str], str]) -> bool:
        """Whether parts of the model, one by one, give what the whole gives; notes which part gives what."""
        parts = defaultdict(list)
        for name in self.weights:
            parts[part(name)].append(name)
        self.sources, self.plain, made = {}, {}, 0
        for names in parts.values():
            try:
                found = revert_weight_conversion(self.model, {name: self.weights[name] for name in names})
            except Exception:  # a conversion that misses a weight may trip over anything
                return False
            made += len(found)
            for name, tensor in found.items():
                whole = self.tensors.get(name)
                if whole is None or (whole.shape, whole.dtype) != (tensor.shape, tensor.dtype):
                    return False
                self.sources[name] = tuple(names)
                self.plain.update((name, n) for n in names if self.weights[n] is tensor)
        return made == len(self.sources) == len(self.tensors)

    def make(self, weights: Weights, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the files, in any order, from few weights at a time.

        Args:
            weights: where the model's weights are.
            names: of `tensors`.
        """
        parts: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for name in names:
            if (stored := weights.stored(name)) is not None:
                yield name, stored.to(self.tensors[name].dtype)
            else:
                parts[self.sources[name]].add(name)
        for part, wanted in parts.items():
            known = {name: next((n for n in self.names[name] if n in weights), name) for name in part}
            read = weights.read(tuple(known.values()))
            held = {name: read[key].to(self.weights[name].dtype) for name, key in known.items()}
            del read
            for name, tensor in revert_weight_conversion(self.model, held).items():
                if name in wanted:
                    yield name, tensor


def empty(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor's shape on the meta device, the whole one's where it is sharded."""
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


def _layer(name: str) -> Any:
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else name
