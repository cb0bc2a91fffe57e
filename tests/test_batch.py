import numpy as np
import pytest
import torch
from tiny import ragged_samples

from lightning_itk import batch as b


def sample(i, prompt, response, teacher=0):
    ids = np.arange(prompt + response) + 100 * (i + 1)
    labels = np.where(np.arange(prompt + response) < prompt, b.IGNORE_INDEX, ids)
    return b.Sample(ids, labels, i, teacher)


SAMPLES = [sample(0, 2, 3), sample(1, 1, 1, teacher=1), sample(2, 3, 4), sample(3, 0, 2, teacher=1)]


def padded():
    return b.pad(SAMPLES, pad_id=0, teachers=("", "expert"), multiple=8)


def packed():
    return b.pack([SAMPLES[:2], SAMPLES[2:]], pad_id=0, teachers=("", "expert"))


def predictions(batch):
    """(token that predicts, token predicted) of every target."""
    targets = b.next_token_labels(batch)
    keep = targets != b.IGNORE_INDEX
    return sorted(zip(batch["input_ids"][keep].tolist(), targets[keep].tolist(), strict=True))


def test_shift_is_by_one_and_stays_within_samples():
    expected = [(101, 102), (102, 103), (103, 104), (200, 201), (302, 303), (303, 304), (304, 305), (305, 306)]
    expected += [(400, 401)]  # sample 3 starts with a label, which no token of its own predicts
    assert predictions(padded()) == predictions(packed()) == expected
    assert b.count_targets(padded()) == b.count_targets(packed()) == len(expected)


def test_layout():
    batch = packed()
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0, 1]]
    assert batch["sample_ids"].tolist() == [[0] * 5 + [1] * 2 + [-1] * 2, [2] * 7 + [3] * 2]
    assert b.cu_seqlens(batch).tolist() == [0, 5, 7, 9, 16, 18]
    assert padded()["input_ids"].shape == (4, 8)
    assert b.is_packed(batch)
    assert not b.is_packed(padded())


def test_unpack_is_the_padded_batch():
    narrow, unpacked = b.pad(SAMPLES, pad_id=0, teachers=("", "expert")), b.unpack(packed())
    assert unpacked.keys() == narrow.keys()
    for key in narrow.keys() - {"teachers"}:
        torch.testing.assert_close(unpacked[key], narrow[key], msg=key)
    again = b.unpack(padded())
    torch.testing.assert_close(again["input_ids"], narrow["input_ids"])


def test_flatten_drops_all_padding():
    for batch in (packed(), padded()):
        flat = b.flatten(batch)
        assert flat["input_ids"].shape == (1, 16)
        assert b.is_packed(flat)
        assert predictions(flat) == predictions(padded())


@pytest.mark.parametrize("batch", [padded(), packed()], ids=["padded", "packed"])
def test_select_keeps_whole_samples_in_order(batch):
    part, index = b.select(batch, batch["teacher_ids"] == 1)
    assert set(part["sample_ids"].flatten().tolist()) == {1, 3}
    assert predictions(part) == [(200, 201), (400, 401)]
    assert part["input_ids"].shape == (2, 2)
    source = batch["input_ids"].flatten()[index.clamp_min(0)]
    torch.testing.assert_close(part["input_ids"], source.masked_fill(index < 0, 0))
    assert ("attention_mask" in part) == ("attention_mask" in batch)
    assert b.select(batch, batch["teacher_ids"] == 7) is None


def test_select_pads_ragged_rows_with_their_own_segment():
    batch = packed()
    part, _ = b.select(batch, batch["teacher_ids"] == 0)
    assert part["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    assert part["sample_ids"].tolist() == [[0] * 5 + [-1] * 2, [2] * 7]


def test_an_empty_row_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        b.pack([[]], pad_id=0)


def test_left_padding_for_generation():
    ids, mask = b.left_padded(b.pad(SAMPLES[:2], pad_id=0))
    assert ids.tolist() == [[100, 101, 102, 103, 104], [0, 0, 0, 200, 201]]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]


def test_padding_on_the_left_is_refused():
    batch = b.pad(ragged_samples(3), pad_id=0)
    turned = b.Batch(**{key: v.flip(1) if isinstance(v, torch.Tensor) else v for key, v in batch.items()})
    with pytest.raises(ValueError, match="a padded batch must have its padding on the right"):
        b.response_rows(turned)
