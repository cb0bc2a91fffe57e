"""Outputs replace nothing that this kit did not write."""

import os

import pytest

from lightning_itk.files import atomic_write
from lightning_itk.outputs import check_output, note_output


def write(path, text="ours"):
    with atomic_write(path) as file:
        file.write(text.encode())
    note_output(path)


def test_only_an_unchanged_output_of_ours_is_replaced_and_only_when_asked(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    check_output(path)  # nothing there
    write(path)
    with pytest.raises(ValueError, match=r"out\.jsonl: exists already; overwrite \(true\) replaces"):
        check_output(path)
    check_output(path, overwrite=True)
    write(path, "ours again")
    check_output(path, overwrite=True)
    path.write_text("ours AGAIN")  # by hand, of the same size
    with pytest.raises(ValueError, match="no run of this kit wrote it, or it was changed since"):
        check_output(path, overwrite=True)
    path.unlink()
    check_output(path)
    for note in (None, "{", "[]"):
        other = tmp_path / "other.jsonl"
        other.write_text("theirs")
        if note is not None:
            (tmp_path / ".other.jsonl.itk.json").write_text(note)
        with pytest.raises(ValueError, match="no run of this kit wrote it"):
            check_output(other, overwrite=True)


def test_what_is_no_place_for_a_file_is_refused_at_once(tmp_path):
    write(tmp_path / "ours")
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (
        ("link", "is a link, name the file itself"),
        ("dangling", "is a link"),
        ("pipe", "is no ordinary file"),
        (".", "is a folder, expected a file to write"),
        ("ours/below/it", "cannot be written: .*ours is a file"),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            check_output(tmp_path / name, overwrite=True)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused_at_once(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written: .* is read-only"):
        check_output(tmp_path / "new" / "out.jsonl")
