"""Optimizers as they step: torch's fused Adam where nobody chose another form."""

import torch

_FUSED = (torch.optim.Adam, torch.optim.AdamW)
_DEVICES = {"cpu", "cuda"}
_FORMS = ("fused", "foreach", "capturable", "differentiable")


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let torch's Adam and AdamW step in one pass over the weights, unless they were told how to.

    Left alone they make temporaries: on a GPU one as large as all weights, on a CPU several of the largest weight.
    """
    if type(optimizer) not in _FUSED:
        return
    for group in optimizer.param_groups:
        chosen = any(group[form] not in (None, False) for form in _FORMS) or False in (group["fused"], group["foreach"])
        able = all(p.is_floating_point() and p.device.type in _DEVICES for p in group["params"])
        if not chosen and able and not isinstance(group["lr"], torch.Tensor):
            # Not by the argument of the same name: that also hands unscaling to the optimizer, and fp16-mixed would
            # neither clip gradients nor count them in their own scale.
            group["fused"] = True
