"""What killed runs leave behind: checkpoints that are none, temporary files."""

from pathlib import Path
from pickle import UnpicklingError

import torch
from torch.distributed.checkpoint import FileSystemReader

from lightning_itk.models.checkpoint import read_checkpoint


def unusable(folder: Path) -> list[Path]:
    """Files and folders with the name of a checkpoint (`*.ckpt`) that hold no whole one.

    With `save_last: link` Lightning removes what the link points to before it sets the next: a link to nothing, which
    `--ckpt_path last` passes by.
    """
    found = [path for path in sorted(folder.glob("runs/**/*.ckpt")) if path.exists()]
    return [path for path in found if not _is_whole(path)]


def _is_whole(path: Path) -> bool:
    try:
        if not path.is_dir():
            read_checkpoint(path)
            return True
        torch.load(path / "meta.pt", weights_only=True)["global_step"]
        metadata = FileSystemReader(path).read_metadata()
        pieces = (metadata.storage_data or {}).values()
        return all((path / piece.relative_path).stat().st_size >= piece.offset + piece.length for piece in pieces)
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, UnpicklingError):
        return False


def leftovers(folder: Path, temporary: Path) -> dict[str, int]:
    """Temporary files of a run that is at its end, with their bytes: beside its checkpoints and caches, in TMPDIR."""
    files = [path for path in temporary.rglob("*") if path.is_file()]
    for path in [*folder.glob("runs/**/*"), *folder.glob("cache/*.partial/*")]:
        hidden = any(part.startswith(".") and part != ".metadata" for part in path.relative_to(folder).parts)
        if path.is_file() and (hidden or path.suffix in (".tmp", ".part", ".partial") or ".partial" in str(path)):
            files.append(path)
    return {str(path): path.stat().st_size for path in files}
