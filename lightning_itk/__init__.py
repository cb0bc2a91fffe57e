"""Instruction tuning for PyTorch Lightning: SFT, distillation with attention maps, domain experts, data selection."""

from lightning_itk.data.module import InstructionDataModule
from lightning_itk.methods.dae import DAEModule
from lightning_itk.methods.kd import KDModule
from lightning_itk.methods.module import InstructionModule
from lightning_itk.methods.sft import SFTModule
from lightning_itk.methods.step import Term
from lightning_itk.methods.teacher import Teacher

__all__ = ["DAEModule", "InstructionDataModule", "InstructionModule", "KDModule", "SFTModule", "Teacher", "Term"]
__version__ = "0.1.0"
