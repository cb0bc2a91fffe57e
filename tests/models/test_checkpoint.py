"""What a checkpoint file may hold."""

import io

import pytest
import torch
from fuzz.engine import one_line

from lightning_itk.models.checkpoint import read_checkpoint

WHOLE = {"state_dict": {"w": torch.arange(6.0)}, "hyper_parameters": {"student": "x"}, "global_step": 3}


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(2),
        [WHOLE],
        {1: 2},
        WHOLE | {"global_step": float("inf")},
        WHOLE | {"global_step": "3"},
        WHOLE | {"hyper_parameters": [{}]},
        WHOLE | {"state_dict": None},
    ],
)
def test_other_content_is_one_line(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="a.ckpt: is no checkpoint of this kit") as raised:
        read_checkpoint(tmp_path / "a.ckpt")
    assert len(str(raised.value).splitlines()) == 1


def test_damage_is_one_line(tmp_path):
    buffer, path = io.BytesIO(), tmp_path / "a.ckpt"
    torch.save(WHOLE, buffer)
    whole = buffer.getvalue()
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            found = read_checkpoint(path)
        except ValueError as error:
            one_line(error, f"{path}: is no checkpoint of this kit (")
        else:
            assert isinstance(found["state_dict"], dict)
