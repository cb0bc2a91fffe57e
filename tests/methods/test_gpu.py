"""The modules on a GPU: the Triton kernels give the gradients of the torch implementation, padded and packed."""

import pytest
import torch
from tiny import ragged_samples, tiny_model

from lightning_itk import batch as b
from lightning_itk.methods.dae import DAEModule
from lightning_itk.methods.distillation import AttentionLoss
from lightning_itk.methods.kd import KDModule
from lightning_itk.methods.sft import SFTModule

pytestmark = pytest.mark.gpu

SHAPE = {"hidden_size": 64, "head_dim": 16, "vocab_size": 1000}
TAGS = ("", "expert")


def gradient(method: str, impl: str, dtype: torch.dtype, packed: bool) -> torch.Tensor:
    """The student's gradient of one batch, as one vector."""

    def model(seed: int):
        return tiny_model("llama", seed, **SHAPE).to("cuda", dtype)

    attention = AttentionLoss(weight=0.5)
    if method == "sft":
        module = SFTModule(model(0), impl=impl)
    elif method == "kd":
        module = KDModule(model(0), model(1), ce_weight=0.3, temperature=2.0, attention=attention, impl=impl)
    else:
        module = DAEModule(model(0), {"reference": model(1), "expert": model(2)}, attention=attention, impl=impl)
    samples = ragged_samples(12, vocab=1000, teachers=2)
    data = (
        b.pack([samples[:5], samples[5:]], pad_id=0, teachers=TAGS)
        if packed
        else b.pad(samples, pad_id=0, teachers=TAGS)
    )
    batch = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in data.items()}
    terms = module.cuda().losses(batch)
    total = torch.stack([term.weight * term.total for term in terms.values() if term.weight]).sum()
    (total / b.count_targets(batch)).backward()
    return torch.cat([p.grad.flatten() for p in module.student.parameters() if p.grad is not None]).double()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["sft", "kd", "dae"])
def test_triton_gradients_are_those_of_torch(method, dtype, limit, packed):
    expected = gradient(method, "torch", dtype, packed)
    found = gradient(method, "triton", dtype, packed)
    assert expected.norm() > 0
    assert (found - expected).norm() / expected.norm() < limit
