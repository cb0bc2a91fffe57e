"""Nothing is ever half there: a kill between any two operations leaves the old or the new, whole."""

import os
import shutil
from pathlib import Path

import pytest

from lightning_itk.files import atomic_write, remove, take_place


class Killed(BaseException):
    pass


@pytest.fixture
def killed_at(monkeypatch):
    """Let everything from the n-th change of the file system on not happen."""
    real = {name: getattr(os, name) for name in ("rename", "replace", "unlink", "rmdir")}
    left = [-1]

    def counted(name):
        def call(*args, **kwargs):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real[name](*args, **kwargs)

        return call

    for name in real:
        monkeypatch.setattr(os, name, counted(name))
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # so that each removal is one of the calls above
    return lambda count: left.__setitem__(0, count)


def write(path: Path, kind: str, content: str) -> Path:
    if kind == "file":
        path.write_text(content)
    else:
        path.mkdir()
        for name in ("a", "b"):
            (path / name).write_text(content)
    return path


def read(path: Path) -> str | None:
    """What a file or a whole folder holds; None where nothing is."""
    if path.is_file():
        return path.read_text()
    return "".join(sorted({(path / name).read_text() for name in ("a", "b")})) if path.is_dir() else None


@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("old", ["file", "folder", "nothing"])
def test_a_kill_leaves_the_old_or_the_new(old, new, killed_at, tmp_path):
    for kill in range(12):
        folder = tmp_path / str(kill)
        folder.mkdir()
        path = folder / "last.ckpt"
        if old != "nothing":
            write(path, old, "old")
        unfinished = write(folder / ".last.ckpt.unfinished", new, "new")
        killed_at(kill)
        try:
            take_place(unfinished, path)
            done = True
        except Killed:
            done = False
        killed_at(-1)
        found = [read(path) for path in sorted(folder.glob("*.ckpt"))]  # where `--ckpt_path last` looks
        assert found == ["new"] if done else {*found} <= {"old", "new"} and (found or old == "nothing"), kill
        if not done:  # and the next save is not disturbed by what was left
            remove(unfinished)
            take_place(write(unfinished, new, "newer"), path)
            assert read(path) == "newer"
        if done:
            assert os.listdir(folder) == ["last.ckpt"]
            return
    raise AssertionError("never done")


def test_a_link_is_replaced_and_its_target_is_not(tmp_path):
    target = write(tmp_path / "step=3.ckpt", "folder", "target")
    (tmp_path / "last.ckpt").symlink_to(target.name)
    take_place(write(tmp_path / "new", "file", "new"), tmp_path / "last.ckpt")
    assert (read(tmp_path / "last.ckpt"), read(target)) == ("new", "target")
    (tmp_path / "link").symlink_to(target.name)
    remove(tmp_path / "link")
    assert read(target) == "target"
    remove(tmp_path / "nothing")


def test_an_error_leaves_the_old_file(tmp_path):
    path = write(tmp_path / "out.json", "file", "old")
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.write("half")
    assert os.listdir(tmp_path) == ["out.json"]
    assert path.read_text() == "old"
