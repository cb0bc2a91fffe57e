"""Which card runs which kernel, and what people are told about it; no GPU is needed to ask."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from lightning_itk.kernels import launch
from lightning_itk.losses.implementation import describe_impl, resolve_impl

CARD = torch.device("cuda", 0)
SOLD = {(8, 0): "A100", (8, 6): "RTX 30", (8, 9): "L4", (9, 0): "H100", (10, 0): "B200", (10, 3): "B300"}
SOLD |= {(12, 0): "RTX 50", (12, 1): "GB10"}

pytestmark = pytest.mark.skipif(launch.INTERPRET, reason="the interpreter is a card of its own")


@pytest.fixture
def card(monkeypatch):
    """Pretend that CARD is of a compute capability; returns a tensor on it, as far as the dispatch looks at one."""

    def pretend(*capability: int, dtype: torch.dtype = torch.bfloat16):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return SimpleNamespace(device=CARD, dtype=dtype)

    monkeypatch.setattr(torch.version, "hip", None)
    return pretend


@pytest.mark.parametrize("capability", SOLD, ids=SOLD.get)
def test_every_card_runs_every_kernel(card, capability):
    tensor = card(*capability)
    arch = launch.architecture(CARD)
    assert resolve_impl("auto", tensor, "jsd") == resolve_impl("auto", tensor, head_dim=256) == "triton"
    assert describe_impl("auto", tensor, "forward", 256) == "triton (impl=auto) on cuda:0"
    assert launch.row_tile(arch)
    for itemsize in (2, 4):
        assert launch.eval_tile(arch, itemsize, True)
        for kernel in ("forward", "dq", "dk"):
            for dim in (64, 128, 256):
                assert launch.attention_tile(arch, kernel, dim, itemsize, True)


def test_one_case_that_does_not_fit_leaves_the_rest_in_triton(card):
    tensor = card(8, 6)
    assert resolve_impl("auto", tensor, "forward") == "triton"
    assert resolve_impl("auto", tensor, head_dim=512) == "torch"
    with pytest.raises(RuntimeError, match="cannot run here: head dim 512 does not fit"):
        resolve_impl("triton", tensor, head_dim=512)
    assert describe_impl("auto", tensor, "forward", 512) == (
        "triton (impl=auto) on cuda:0; attention: torch, "
        "head dim 512 does not fit the attention kernels, which hold up to 256"
    )
    assert describe_impl("auto", tensor, "mine", 64) == (
        "torch (impl=auto) on cuda:0, the kernels know no divergence of the kind 'mine'; attention: triton"
    )


def test_a_card_without_tiles_is_said(card):
    text = describe_impl("auto", card(7, 5), "forward", 64)
    assert text.startswith("torch (impl=auto) on cuda:0, Triton kernels have tiles for sm_80, ")
    assert text.endswith("found sm_75")
    assert describe_impl("torch", card(7, 5), "forward", 64) == "torch (impl=torch) on cuda:0"
    assert "fp64 precision" in describe_impl("auto", card(9, 0, dtype=torch.float64), "forward")


def test_the_fused_backward_kernel_leaves_heavy_problems_to_the_two():
    for arch in ("sm_80", "sm_90", "sm_100"):
        for dim in (16, 64, 128):
            assert launch.fused_tile(arch, dim, 2, True, True)
            assert launch.fused_tile(arch, dim, 2, True, False)
        assert launch.fused_tile(arch, 256, 2, True, True) is None
        assert launch.fused_tile(arch, 128, 4, True, True) is None
        assert launch.fused_tile(arch, 128, 2, False, False) is None
    assert launch.fused_tile("gfx942", 128, 2, True, True) is None


def test_as_many_splits_as_fill_the_card_within_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    tile = launch.Tile(64, 128, 8, 2)
    assert launch.fused_splits(CARD, tile, groups=8, blocks=64, part_bytes=1 << 20) == 17
    assert launch.fused_splits(CARD, tile._replace(warps=4), groups=8, blocks=64, part_bytes=1 << 20) == 33
    assert launch.fused_splits(CARD, tile, groups=8, blocks=4, part_bytes=1 << 20) == 4
    assert launch.fused_splits(CARD, tile, groups=8, blocks=64, part_bytes=100 << 20) == 2
    assert launch.fused_splits(CARD, tile, groups=8, blocks=64, part_bytes=257 << 20) == 0
