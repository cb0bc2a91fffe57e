"""The attention-map loss in the Triton interpreter against fp64 autograd on materialised maps."""

import pytest
import torch
from interpreter import inside, outside, run_in_the_interpreter
from maps import PACKED, answers, check, log_map, padding, problem, reference, visibility

pytest.importorskip("triton")
import lightning_itk.attention.kl as front
from lightning_itk.kernels.attention import attention_kl, segments

pytestmark = pytest.mark.interpret


@outside
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@inside
@pytest.mark.parametrize("heads", [(4, 4, 4, 4), (4, 1, 4, 2), (2, 2, 6, 3), (4, 4, 2, 1)], ids=str)
def test_grouped_heads_on_either_side(heads):
    check(*problem(heads=heads, length=37))


@inside
@pytest.mark.parametrize("kind", ["forward", "reverse"])
@pytest.mark.parametrize(
    "mask",
    [{"window": 7}, {"window": 2}, {"cu_seqlens": PACKED}, {"key_mask": padding()}, {"causal": False}],
    ids=lambda mask: next(iter(mask)) + str(mask.get("window", "")),
)
def test_masks(kind, mask):
    tensors, options = problem(heads=(2, 1, 2, 1))
    check(tensors, options | mask | {"kind": kind, "row_mask": answers() if "key_mask" in mask else None})


@inside
@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_everything_at_once(kind):
    tensors, options = problem(heads=(2, 2, 4, 2))
    options |= {"window": 20, "cu_seqlens": PACKED, "key_mask": padding(), "row_mask": answers(), "kind": kind}
    check(tensors, options | {"temperature": 2.0, "softcap_student": 3.0, "softcap_teacher": 4.0})


@inside
def test_the_public_function_lets_the_kernels_pair_heads(monkeypatch):
    """A head map would cost the larger tiles, and a copy from the host in every layer."""
    import lightning_itk.attention as public
    from lightning_itk.kernels import attention as kernels

    fixed = []
    original = kernels._attention_loss
    monkeypatch.setattr(kernels, "_attention_loss", lambda *args: fixed.append(args[18]) or original(*args))
    tensors, options = problem(heads=(4, 2, 4, 2), length=33)
    found = public.attention_kl(*(x.float() for x in tensors), **options, impl="triton")
    torch.testing.assert_close(found, reference(*tensors, **options).float(), rtol=1e-4, atol=0)
    assert fixed == [True]


@inside
@pytest.mark.parametrize("bounds", [[0, 30], [3, 40], [0, 25, 13, 40], [0.0, 40.0], [[0, 40]]], ids=str)
def test_both_engines_refuse_bad_boundaries_alike(bounds):
    """The kernels would read them as they are: cut off, or of no order."""
    import lightning_itk.attention as public

    tensors, options = problem(length=20)
    messages = []
    for impl in ("triton", "torch"):
        with pytest.raises(ValueError, match="attention_kl: cu_seqlens must") as error:
            public.attention_kl(*tensors, **options, cu_seqlens=torch.tensor(bounds), impl=impl)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]


@inside
def test_explicit_head_map():
    tensors, options = problem(heads=(2, 1, 4, 2), length=33)
    check(tensors, options | {"head_map": torch.tensor([[3, 0], [1, 1]])})
    check(tensors, options | {"head_map": torch.tensor([[3, 1], [0, 1]]).T})  # the same, of another stride


@inside
@pytest.mark.parametrize("dims", [(80, 64), (96, 256), (17, 128)], ids=str)
def test_head_dims(dims):
    check(*problem(batch=1, length=35, heads=(1, 1, 1, 1), dims=dims))


@inside
@pytest.mark.parametrize("length", [1, 17, 64])
def test_lengths(length):
    check(*problem(batch=1, length=length, heads=(1, 1, 1, 1)))


@inside
@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_student_close_to_a_sharp_teacher(kind):
    """Scores of standard deviation 12, where nearly all weight is on one key, and a KL of about 1e-3 per row."""
    (_, _, q_t, k_t), options = problem(batch=1, heads=(2, 2, 2, 2), dims=(24, 24), std=12.0)
    tensors = (q_t + 0.004 * torch.randn_like(q_t), k_t + 0.004 * torch.randn_like(k_t), q_t, k_t)
    value = check(tensors, options | {"kind": kind}, tolerance=1e-3)
    assert 1e-5 < value / 50 < 1e-2


@inside
@pytest.mark.parametrize("heads", [(2, 1, 2, 1), (2, 1, 4, 2)], ids=str)
def test_log_sum_exps_from_the_caller(heads):
    tensors, options = problem(heads=heads)
    mask = {"key_mask": padding(), "window": 11}
    seen = visibility(2, 50, **mask)
    _, lse_s = log_map(*tensors[:2], seen, options["scale_student"], None, 1.0)
    _, lse_t = log_map(*tensors[2:], seen, options["scale_teacher"], None, 1.0)
    lse = {"lse_student": lse_s, "lse_teacher": lse_t}
    check(tensors, options | mask | {"row_mask": answers()}, lse=lse)
    check(tensors, options | mask, lse=lse)


@inside
@pytest.mark.parametrize("kind", ["forward", "reverse"])
@pytest.mark.parametrize("mask", [{}, {"cu_seqlens": torch.tensor([0, 13, 50, 100])}, {"causal": False}], ids=list)
def test_log_sum_exps_through_the_front_door(kind, mask, monkeypatch):
    """The public function in Triton, with and without them, and in torch, which makes its own."""
    tensors, options = problem(heads=(2, 1, 4, 2))
    options |= mask | {"kind": kind, "temperature": 2.0}
    seen = visibility(2, 50, **mask)
    student, teacher = (log_map(*tensors[n : n + 2], seen, options[f"scale_{who}"], None, 2.0)[1]
                        for n, who in ((0, "student"), (2, "teacher")))  # fmt: skip
    lse = {"lse_student": student, "lse_teacher": teacher}
    found = []
    for impl, more in (("torch", {}), ("torch", lse), ("triton", {}), ("triton", lse)):
        monkeypatch.setattr(front, "resolve_impl", lambda *args, impl=impl, **rest: impl)
        q, k = (x.detach().clone().requires_grad_() for x in tensors[:2])
        value = front.attention_kl(q, k, *tensors[2:], **options, **more)
        (value * 1.7).backward()
        found.append((value.detach(), q.grad, k.grad))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@inside
def test_rows_without_keys_or_without_loss():
    tensors, options = problem(length=40)
    leaves = [x.requires_grad_(n < 2) for n, x in enumerate(tensors)]
    nothing = torch.zeros(2, 40, dtype=torch.bool)
    for mask in ({"key_mask": nothing}, {"row_mask": nothing}):
        loss = attention_kl(*leaves, **options, **mask)
        gradients = torch.autograd.grad(loss, leaves[:2])
        assert loss.item() == 0
        assert not any(g.any() for g in gradients)


@inside
@pytest.mark.parametrize(("batch", "length"), [(0, 40), (0, 0), (2, 0)])
def test_no_rows_at_all(batch, length):
    leaves = [torch.randn(batch, 2, length, 8, requires_grad=True) for _ in range(4)]
    mask = torch.ones(batch, length, dtype=torch.bool)
    for masks in ({}, {"row_mask": mask}, {"key_mask": mask}):
        loss = attention_kl(*leaves, scale_student=1.0, scale_teacher=1.0, **masks)
        loss.backward()
        assert loss.item() == 0
        assert leaves[1].grad.shape == leaves[1].shape


@inside
def test_blocks_without_kept_rows_are_never_read():
    """Queries of blocks that no kept row belongs to may hold anything: every kernel leaves them out."""
    tensors, options = problem(batch=1, length=70, heads=(2, 1, 2, 1))
    rows = torch.zeros(1, 70, dtype=torch.bool)
    rows[0, 66:] = True
    expected = check(tensors, options | {"row_mask": rows})
    poisoned = [x.clone() for x in tensors]
    poisoned[0][:, :, :64], poisoned[2][:, :, :64] = float("nan"), float("nan")
    leaves = [x.requires_grad_(n < 2) for n, x in enumerate(poisoned)]
    loss = attention_kl(*leaves, **options, row_mask=rows)
    loss.backward()
    assert torch.equal(loss.detach(), expected)
    assert all(bool(x.grad.isfinite().all()) for x in leaves[:2])
    assert not leaves[0].grad[:, :, :64].any()
    assert leaves[1].grad.any()


def test_segments_end_with_their_row():
    found = segments(torch.tensor([0, 3, 3, 6], dtype=torch.int32), 2, 4)
    assert found[0].tolist() == [[0, 0, 0, 3], [0, 0, 2, 2]]
    assert found[1].tolist() == [[3, 3, 3, 4], [2, 2, 4, 4]]


@inside
def test_half_precision():
    tensors, options = problem(batch=1, length=40, heads=(2, 1, 2, 1))
    check(tuple(x.half() for x in tensors), options, tolerance=3e-3)


@inside
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "jsd"}, "forward and reverse"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"window": 0}, "window must be positive"),
        ({"window": 4, "causal": False}, "needs causal"),
        ({"key_mask": torch.ones(2, 50)}, "key_mask must be bool"),
        ({"head_map": torch.zeros(3, 1, dtype=torch.int64)}, "head_map must be"),
        ({"lse_student": torch.zeros(2, 4, 50)}, "come together"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change, message):
    tensors, options = problem()
    with pytest.raises(ValueError, match=message):
        attention_kl(*tensors, **(options | change))


@inside
def test_bad_shapes_are_named():
    tensors, options = problem()
    for index, shape, message in ((1, (2, 3, 50, 16), "student q and k"), (2, (2, 3, 50, 24), "teacher q and k")):
        bad = [torch.zeros(shape) if n == index else x for n, x in enumerate(tensors)]
        with pytest.raises(ValueError, match=message):
            attention_kl(*bad, **options)
    with pytest.raises(ValueError, match="do not divide"):
        attention_kl(*problem(heads=(4, 2, 6, 2))[0], **options)
