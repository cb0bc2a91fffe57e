"""Instruction tuning for PyTorch Lightning: SFT, distillation with attention maps, domain experts, data selection."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_itk.data.module import InstructionDataModule
    from lightning_itk.methods.attention_maps import AttentionLoss
    from lightning_itk.methods.dae import DAEModule
    from lightning_itk.methods.kd import KDModule
    from lightning_itk.methods.module import InstructionModule
    from lightning_itk.methods.sft import SFTModule
    from lightning_itk.methods.step import Term
    from lightning_itk.methods.teacher import Teacher
    from lightning_itk.strategy import FSDP2Strategy

__version__ = "0.1.0"
__all__ = [
    "AttentionLoss",
    "DAEModule",
    "FSDP2Strategy",
    "InstructionDataModule",
    "InstructionModule",
    "KDModule",
    "SFTModule",
    "Teacher",
    "Term",
]

# Looked up when asked for (PEP 562): an import of the package, as `lightning-itk --help` needs it, loads no torch.
_HOMES = {
    "AttentionLoss": "methods.attention_maps",
    "DAEModule": "methods.dae",
    "FSDP2Strategy": "strategy",
    "InstructionDataModule": "data.module",
    "InstructionModule": "methods.module",
    "KDModule": "methods.kd",
    "SFTModule": "methods.sft",
    "Teacher": "methods.teacher",
    "Term": "methods.step",
}
_ROOMS = {
    "attention",
    "batch",
    "callbacks",
    "choice",
    "data",
    "losses",
    "metrics",
    "recorder",
    "report",
    "results",
    "selection",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS})
