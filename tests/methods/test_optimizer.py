"""An optimizer step needs no temporaries as large as the weights, and what the user says of it stands."""

import pytest
import torch
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_itk as itk
from lightning_itk.methods.optimizer import fuse


class Largest(TorchDispatchMode):
    """The most elements of a tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = function(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
        new = [tensor.numel() for tensor in made if tensor.untyped_storage().data_ptr() not in known]
        self.elements = max([self.elements, *new])
        return result


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_a_step_makes_nothing_of_the_size_of_a_weight(kind):
    model = itk.SFTModule(tiny_model(), optimizer=lambda p: kind(p, lr=1e-3), lr_scheduler=None)
    optimizer = model.configure_optimizers()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # makes the moments
    with Largest() as largest:
        optimizer.step()
    assert largest.elements < max(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("told", [{"fused": False}, {"foreach": True}, {"foreach": False}, {"capturable": True}])
def test_what_the_user_says_stands(told):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.1, **told)
    before = [dict(group) for group in optimizer.param_groups]
    fuse(optimizer)
    assert [dict(group) for group in optimizer.param_groups] == before


def test_groups_are_asked_one_by_one():
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "fused": fused} for fused in (None, False)]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    fuse(optimizer)
    assert [group["fused"] for group in optimizer.param_groups] == [True, False]


class Own(torch.optim.AdamW):
    pass


@pytest.mark.parametrize("kind", [torch.optim.SGD, Own])
def test_other_optimizers_are_left_alone(kind):
    optimizer = kind([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    fuse(optimizer)
    assert not optimizer.param_groups[0]["fused"]


def test_a_fused_step_is_that_of_the_formula():
    start, gradients = torch.randn(2, 40, 7).unbind()
    weights = []
    for fused in (True, False):
        weight = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1, fused=None if fused else False)
        fuse(optimizer)
        for step in range(3):
            weight.grad = gradients * (step + 1)
            optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-6)
