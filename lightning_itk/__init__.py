"""Instruction tuning for PyTorch Lightning: SFT, distillation with attention maps, domain experts, data selection."""

from lightning_itk.dae import DAEModule
from lightning_itk.data import InstructionDataModule
from lightning_itk.kd import KDModule
from lightning_itk.module import InstructionModule, Term
from lightning_itk.sft import SFTModule
from lightning_itk.teacher import Teacher

__all__ = ["DAEModule", "InstructionDataModule", "InstructionModule", "KDModule", "SFTModule", "Teacher", "Term"]
__version__ = "0.1.0"
