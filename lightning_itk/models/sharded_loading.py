"""Weights that are read after a model was sharded: every rank reads its own rows from safetensors, and nothing else.

A model is built on the meta device at first. Once it is known how it is sharded, transformers reads a twin of it that
is cut in the same way, by its own rules for names, precision, tied weights and buffers; the model takes its tensors.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate, product
from typing import Any

import torch
import transformers
from lightning.pytorch.utilities import rank_zero_info
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel
from transformers.modeling_utils import local_torch_dtype

from lightning_itk.hub import first_line

LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError)
_ATTRIBUTE = "_itk_deferred"
_MERGES = {"MergeModulelist": {0}, "Concatenate": {1, 2}}  # operations, by dim, that keep an expert in one piece
_deferred: ContextVar[bool] = ContextVar("deferred", default=False)


@contextmanager
def deferred_loading(on: bool | None = True) -> Iterator[None]:
    """Models that are loaded in here get their weights in `configure_model` of the module that they belong to.

    Args:
        on: None = as outside.
    """
    token = _deferred.set(_deferred.get() if on is None else on)
    try:
        yield
    finally:
        _deferred.reset(token)


class Deferred:
    """Where the weights of a model on the meta device come from."""

    def __init__(self, auto: Any, name: str, loading: dict[str, Any], model: PreTrainedModel) -> None:
        self.auto, self.name, self.loading = auto, name, loading
        self.modules = dict(model.named_modules(remove_duplicate=False))  # by the names that checkpoints know
        self.experts = 0

    def twin(self, mesh: DeviceMesh | None) -> PreTrainedModel:
        """The model as transformers loads it, cut into rows for the ranks of `mesh`."""
        whole = mesh is None or (self.experts and -(-self.experts // mesh.size()) * (mesh.size() - 1) >= self.experts)
        if whole:  # also where some rank would get no expert, of which transformers cannot make a tensor
            return self.auto.from_pretrained(self.name, **self.loading)

        def load(
            own: Callable[..., Any], model: PreTrainedModel, state: Any, files: Any, *rest: Any, **more: Any
        ) -> Any:
            _cut(model, mesh)  # type: ignore[arg-type]
            return own(model, _rows(files), files, *rest, **more)

        with _replaced(_load_pretrained_model=load):
            return self.auto.from_pretrained(self.name, **self.loading)


class _Obstacle(Exception):
    """Why a model is not read by rows."""


def is_deferred(model: nn.Module) -> bool:
    """Whether a model has no weights yet: `read_weights` gets them."""
    return _of(model) is not None


def _of(model: nn.Module) -> Deferred | None:
    found = (getattr(module, _ATTRIBUTE, None) for module in model.modules() if isinstance(module, PreTrainedModel))
    return next((deferred for deferred in found if deferred is not None), None)


def defer(auto: Any, name: str, loading: dict[str, Any]) -> PreTrainedModel | None:
    """The model without its weights, where `deferred_loading` is on and it can be read by rows; None where not, and a
    line that says why unless `from_pretrained` will.

    Args:
        auto: AutoModelForCausalLM, …
        name: folder or hub name.
        loading: arguments of `from_pretrained`.
    """
    if not _deferred.get():
        return None
    experts = 0

    def look(own: Any, model: PreTrainedModel, state: Any, files: Any, config: Any, *_: Any, **__: Any) -> Any:
        nonlocal experts
        if config.pretrained_model_name_or_path != name:
            raise _Obstacle("it is an adapter")
        experts = _check(model, state, files, config)
        return None, None

    def finish(own: Any, model: PreTrainedModel, *_: Any) -> None:
        model.tie_weights()

    try:
        if "gguf_file" in loading:
            raise _Obstacle("it is a GGUF file")
        for argument in ("device_map", "distributed_config", "tp_plan"):
            if loading.get(argument) is not None:
                raise _Obstacle(f"{argument} says where it goes")
        with _replaced(_load_pretrained_model=look, _finalize_model_loading=finish):
            model = auto.from_pretrained(name, **loading)
    except (_Obstacle, AttributeError, TypeError, ImportError) as error:
        reason = str(error) if isinstance(error, _Obstacle) else f"transformers {transformers.__version__} is unknown"
        if reason:
            rank_zero_info(f"model {name!r} is read whole by every rank: {reason}")
        return None
    deferred = Deferred(auto, name, loading, model)
    deferred.experts = experts
    setattr(model, _ATTRIBUTE, deferred)
    return model


def read_weights(model: nn.Module, mesh: DeviceMesh | None) -> bool:
    """Give a deferred model its weights: rows of them where FSDP2 has sharded it over `mesh`, else all. On all ranks.

    Returns:
        Whether it had none.

    Raises:
        ValueError: weights that cannot be read, on any rank; one line.
    """
    deferred = _of(model)
    if deferred is None:
        return False
    twin, wrong = None, None
    try:
        with local_torch_dtype(torch.float32):  # Lightning has set another for precision bf16-true
            twin = deferred.twin(mesh)
    except LOADING_ERRORS as error:
        wrong = f"model {deferred.name!r} cannot be loaded: {first_line(error)}"
    if mesh is not None and mesh.size() > 1:  # a rank that stops alone leaves the others waiting
        found: list[str | None] = [None] * mesh.size()
        torch.distributed.all_gather_object(found, wrong, group=mesh.get_group())
        wrong = next((line for line in found if line), None)
    if wrong is not None or twin is None:
        raise ValueError(wrong)
    delattr(deferred.modules[""], _ATTRIBUTE)
    _take(model, deferred.modules, twin)
    return True


@contextmanager
def real_adapters(model: nn.Module, trained: Collection[str]) -> Iterator[None]:
    """Let peft add adapters to a model without weights as if it had some: it makes them where the weights are, and
    those of a meta device would lose what they were initialised with.

    Args:
        trained: names of layers that peft copies, which would take memory here.
    """
    kept = []
    for path, module in model.named_modules():
        within = accumulate(path.split("."), "{}.{}".format)
        if not any(outer.endswith(tuple(trained)) for outer in within):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    kept.append((module, name, parameter))
                    stand_in = torch.zeros((), dtype=parameter.dtype, device="cpu").expand(parameter.shape)
                    module._parameters[name] = nn.Parameter(stand_in, requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for module, name, parameter in kept:
            trainable = module._parameters[name].requires_grad  # type: ignore[union-attr]
            module._parameters[name] = parameter.requires_grad_(trainable)


class _Rows:
    """A tensor of a safetensors file, as transformers slices it: read when asked for, into memory of its own. The file
    is mapped no longer than that, so that its pages do not count twice."""

    def __init__(self, file: str, key: str, shape: list[int], dtype: str) -> None:
        self._file, self._key, self._shape, self._dtype = file, key, shape, dtype

    def get_shape(self) -> list[int]:
        return self._shape

    def get_dtype(self) -> str:
        return self._dtype

    def __getitem__(self, index: Any) -> Tensor:
        with safe_open(self._file, framework="pt", device="cpu") as file:
            return file.get_slice(self._key)[index].clone()


def _rows(files: list[str]) -> dict[str, _Rows]:
    found = {}
    for path in files:
        with safe_open(path, framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118 - no dict
                view = file.get_slice(key)
                found[key] = _Rows(path, key, view.get_shape(), view.get_dtype())
    return found


@contextmanager
def _replaced(**steps: Callable[..., Any]) -> Iterator[None]:
    """Let `from_pretrained` take other steps, which get its own ones first."""
    with contextlib.ExitStack() as stack:
        for name, step in steps.items():
            own = getattr(PreTrainedModel, name)
            kept = vars(PreTrainedModel)[name]

            def taken(*args: Any, step: Any = step, own: Any = own, **kwargs: Any) -> Any:
                return step(own, *args, **kwargs)

            setattr(PreTrainedModel, name, staticmethod(taken))
            stack.callback(setattr, PreTrainedModel, name, kept)
        yield


def _check(model: PreTrainedModel, state: Any, files: Any, config: Any) -> int:
    """Refuse what cannot be read by rows; without a reason what `from_pretrained` may refuse itself.

    Returns:
        The number of experts that are merged while they are read; 0 where none are.
    """
    from transformers.core_model_loading import (  # the first cuts what is read: without it none of this is right
        DtensorShardOperation,  # noqa: F401
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    if model.is_custom_code():
        raise _Obstacle("its code comes with it")
    if config.hf_quantizer is not None:
        raise _Obstacle("it is quantised")
    if state is not None or not files or not all(file.endswith(".safetensors") for file in files):
        raise _Obstacle("its weights are not in safetensors files")
    mapping = config.weight_mapping or []
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    expected, found, experts = model.state_dict(), set(), 0
    where = (model.base_model_prefix, expected)
    for key, rows in _rows(files).items():
        name, pattern = rename_source_key(key, renamings, converters, *where)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], *where)
        if name not in expected:
            continue
        found.add(name)
        if pattern is not None:
            rule = next(rule for rule in converters if pattern in rule.source_patterns)
            for operation in rule.operations:
                if getattr(operation, "dim", None) not in _MERGES.get(type(operation).__name__, ()):
                    raise _Obstacle(f"transformers converts its weights ({type(operation).__name__}, at {key})")
            experts = min(experts or expected[name].shape[0], expected[name].shape[0])
        elif list(expected[name].shape) != rows.get_shape():
            raise _Obstacle
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if expected.keys() - found - tied.keys() or found & tied.keys():
        raise _Obstacle  # missing, or a tied weight that may have a value of its own
    return experts


def _cut(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make every parameter, on the meta device, one of which each rank has the rows that FSDP2 gives it."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            shape, _ = compute_local_shape_and_global_offset(parameter.shape, mesh, [Shard(0)])
            local = torch.empty(shape, dtype=parameter.dtype, device="meta")
            rows = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
            )
            module._parameters[name] = nn.Parameter(rows, requires_grad=parameter.requires_grad)


def _take(model: nn.Module, modules: dict[str, nn.Module], twin: PreTrainedModel) -> None:
    """Move a twin's tensors to the modules of the same names, wherever those are in `model` by now."""
    taken: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # by parameter of the model, which stays alive here

    def put(module: nn.Module, name: str, value: Tensor) -> None:
        old = module._parameters[name]
        assert old is not None
        if id(old) not in taken:
            if isinstance(old, DTensor) and not isinstance(value, DTensor):
                value = distribute_tensor(value, old.device_mesh, old.placements, src_data_rank=None).clone()
            if value.shape != old.shape:
                raise ValueError(f"{name}: {tuple(value.shape)} was read, expected {tuple(old.shape)}")
            taken[id(old)] = old, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
        module._parameters[name] = taken[id(old)][1]

    for path, source in twin.named_modules(remove_duplicate=False):
        for name, parameter in list(source._parameters.items()):
            if parameter is not None:
                put(modules[path], name, parameter.detach())
                source._parameters[name] = None
        modules[path]._buffers.update(source._buffers)
    for wrapper in model.modules():  # peft's modules_to_save begin as copies
        if not {"original_module", "modules_to_save"} <= wrapper._modules.keys():
            continue
        original, copies = (wrapper.get_submodule(name) for name in ("original_module", "modules_to_save"))
        for copied, (path, source) in product(copies.children(), original.named_modules()):
            own = copied.get_submodule(path)
            for name, parameter in source._parameters.items():
                if parameter is not None and own._parameters[name].is_meta:  # type: ignore[union-attr]
                    put(own, name, parameter.detach().clone())
            own._buffers.update(
                {name: buffer.clone() for name, buffer in source._buffers.items() if buffer is not None}
            )
    own_model = modules[""]
    own_model._weight_conversions = getattr(twin, "_weight_conversions", None)  # type: ignore[assignment]
