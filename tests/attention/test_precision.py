"""The attention loss under autocast: queries and keys in its dtype, as attention itself multiplies them."""

import pytest
import torch

from lightning_itk.attention import attention_kl


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.01), (torch.float16, 0.001)], ids=["bf16", "fp16"])
def test_autocast_rounds_queries_and_keys_as_attention_does(dtype, limit) -> None:
    """To the bit what inputs in its dtype give; gradients in the dtype of before; fp64 as without it."""
    torch.manual_seed(0)
    shapes = [(2, 4, 31, 8), (2, 2, 31, 8), (2, 4, 31, 6), (2, 4, 31, 6)]
    exact = [1.5 * torch.randn(shape, dtype=torch.float64) for shape in shapes]
    results = []
    for start, within in ((torch.float64, False), (torch.float32, True), (dtype, False), (torch.float64, True)):
        tensors = [t.to(start).clone().requires_grad_(n < 2) for n, t in enumerate(exact)]
        with torch.autocast("cpu", dtype=dtype, enabled=within):
            value = attention_kl(*tensors)
        value.backward()
        results.append([value.detach(), *(t.grad for t in tensors[:2])])
    truth, ours, low, double = results
    assert ours[1].dtype == ours[2].dtype == torch.float32
    for found, expected in zip(ours, low, strict=True):
        assert torch.equal(found.to(dtype), expected.to(dtype))
    for found, expected in zip(ours, truth, strict=True):
        error = (found - expected).norm() / expected.norm()
        print(f"{dtype}: relative error {error:.1e}")
        assert error < limit
    for found, expected in zip(double, truth, strict=True):
        assert torch.equal(found, expected)


def test_the_wider_head_decides_about_the_kernels(monkeypatch) -> None:
    """Head dims that the kernels do not hold run in torch under auto, and are refused in one line under triton."""
    pytest.importorskip("triton")
    from lightning_itk.kernels import launch

    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 288)
    with pytest.raises(RuntimeError, match="cannot run here: head dim 288 does not fit the attention kernels"):
        attention_kl(q, q, k, k, impl="triton")
    with pytest.raises(RuntimeError, match="lose fp64"):
        attention_kl(q, q, q.double(), q.double(), impl="triton")
