"""Instruction tuning for PyTorch Lightning: SFT, distillation with attention maps, domain experts, data selection."""
