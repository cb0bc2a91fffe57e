"""Boundaries of packed rows are refused in one line before an engine reads them, and are looked at once."""

import pytest
import torch

from lightning_itk.attention import boundaries
from lightning_itk.attention.boundaries import check_boundaries

BAD = [
    (torch.tensor([0, 5, 13]), r"must rise from 0 to 26, found \[0, 5, 13\]$"),
    (torch.tensor([2, 5, 26]), r"must rise from 0 to 26, found \[2, 5, 26\]$"),
    (torch.tensor([0, 5, 27]), r"found \[0, 5, 27\]$"),
    (torch.tensor([0, 9, 5, 26]), r"found \[0, 9, 5, 26\] with 5 after 9$"),
    (torch.tensor([0, *range(2, 20), 3, 26]), r"found \[0, 2, 3, ..., 19, 3, 26\] with 3 after 19$"),
    (torch.tensor([0.0, 26.0]), r"must be int32 or int64 of shape \[segments \+ 1\], found float32 \[2\]$"),
    (torch.tensor([False, True]), r"found bool \[2\]$"),
    (torch.tensor([[0, 26]]), r"found int64 \[1, 2\]$"),
    (torch.tensor([0]), r"found int64 \[1\]$"),
    (torch.tensor([], dtype=torch.int32), r"found int32 \[0\]$"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=lambda x: x if isinstance(x, str) else str(x.tolist()))
def test_bad_boundaries_are_one_line(bad, message):
    with pytest.raises(
        ValueError, match=f"^attention_kl: cu_seqlens {message if 'must' in message else '.*' + message}"
    ):
        check_boundaries(bad, 26)


@pytest.mark.parametrize("inference", [False, True])
def test_boundaries_are_looked_at_once(monkeypatch, inference):
    looks = []
    monkeypatch.setattr(boundaries, "_rise", lambda *args, plain=boundaries._rise: looks.append(args) or plain(*args))
    with torch.inference_mode(inference):
        good = torch.tensor([0, 5, 5, 26], dtype=torch.int32)
        for _ in range(3):
            check_boundaries(good, 26)
        assert len(looks) == 1
        with pytest.raises(ValueError, match="from 0 to 52"):  # of another batch
            check_boundaries(good, 52)
        check_boundaries(good.clone(), 26)
    if not inference:
        good[1] = 7
        with pytest.raises(ValueError, match="with 5 after 7"):
            check_boundaries(good, 26)
    held = len(boundaries._right)
    del good
    looks.clear()
    assert len(boundaries._right) < held


def test_a_compiled_graph_asserts_them():
    @torch.compile(backend="aot_eager", fullgraph=True)
    def double(x, bounds):
        check_boundaries(bounds, 4)
        return 2 * x

    assert double(torch.ones(2), torch.tensor([0, 3, 4])).tolist() == [2, 2]
    with pytest.raises(RuntimeError, match=r"cu_seqlens must rise from 0 to B \* S"):
        double(torch.ones(2), torch.tensor([0, 4, 3]))
