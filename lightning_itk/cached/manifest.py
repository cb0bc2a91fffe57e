"""The manifest of a cached teacher: what ran over what, and what was written.

A folder holds `itk_teacher.json` (the manifest, written last), `head.safetensors`, `tokenizer/` and the shards. While
it is made, `itk_teacher.unfinished.json` stands there instead of the manifest and holds the settings, so that a run
that was killed goes on with the same ones or is refused.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from lightning_itk.files import atomic_write

Mode = Literal["states", "topk"]

FORMAT = "lightning_itk cached teacher 1"
NAME, UNFINISHED = "itk_teacher.json", "itk_teacher.unfinished.json"
HEAD, TOKENIZER = "head.safetensors", "tokenizer"
_SHARD = re.compile(r"shard-\d{5,}\.safetensors")
_HALF = re.compile(r"\..+\.\d+\.tmp")  # what a killed run leaves of a file


def shard_name(number: int) -> str:
    return f"shard-{number:05}.safetensors"


class StoredFile(NamedTuple):
    """A file of the folder as it was written."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "StoredFile":
        with path.open("rb") as file:
            return cls(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        settings: what it was made with: mode, k, temperature, a hash of the teacher's weights, the data with whatever
            their tokens depend on, the attention layers, precision and batches.
        teacher: what was found out about the teacher: name, dtype, layers, vocab, the head's scale and softcap, by
            layer how its attention is scaled and masked.
        samples, response_tokens: how many are stored.
        index: hash of which samples stand where in the shards, and of their columns.
        files: head and shards.
    """

    settings: dict[str, Any]
    teacher: dict[str, Any]
    samples: int
    response_tokens: int
    index: str
    files: list[StoredFile]

    @property
    def mode(self) -> Mode:
        return self.settings["mode"]

    @property
    def shards(self) -> list[StoredFile]:
        return [file for file in self.files if file.name != HEAD]

    def write(self, folder: Path) -> None:
        """Write it, which makes the folder complete."""
        _write(folder / NAME, asdict(self) | {"files": [file._asdict() for file in self.files]})
        (folder / UNFINISHED).unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """The manifest of a complete folder, of which every file is there in its size.

        Raises:
            ValueError: one line that says what is wrong.
        """
        folder = Path(folder).expanduser()
        if not (folder / NAME).exists():
            raise ValueError(f"{folder}: this cached teacher is unfinished: run cache-teacher again, it goes on")
        fields = _read(folder / NAME)
        try:
            files = [StoredFile(str(f["name"]), int(f["bytes"]), str(f["sha256"])) for f in fields["files"]]
            found = cls(**{**fields, "files": files})
            if not isinstance(found.settings, dict) or not isinstance(found.teacher, dict):
                raise TypeError
            if found.mode not in get_args(Mode) or any(not _is_ours(file.name) for file in files):
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / NAME}: is no manifest of a cached teacher, or is damaged") from error
        for file in files:
            path = folder / file.name
            if not path.is_file() or path.stat().st_size != file.bytes:
                raise ValueError(f"{path}: is missing or damaged, expected {file.bytes:,} bytes")
        return found

    def verify(self, folder: str | Path) -> None:
        """Read every file and compare it with its hash. Raises ValueError that names the first that differs."""
        for file in self.files:
            if StoredFile.of(Path(folder, file.name)) != file:
                raise ValueError(f"{Path(folder, file.name)}: is not what was written; overwrite (true) makes it anew")


def is_cached_teacher(name: str) -> bool:
    """Whether this is a folder that `cache-teacher` wrote, or has begun."""
    folder = Path(name).expanduser()
    return (folder / NAME).is_file() or (folder / UNFINISHED).is_file()


def check_folder(folder: str | Path) -> None:
    """Refuse a folder that holds anything but a cached teacher. Raises ValueError that names the first such entry."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, a cached teacher is a folder")
    if not folder.is_dir():
        return
    ours = is_cached_teacher(str(folder))
    known = (path for path in folder.iterdir() if ours and _is_ours(path.name) and not path.is_symlink())
    foreign = sorted({path.name for path in folder.iterdir()} - {path.name for path in known})
    if foreign:
        raise ValueError(
            f"{folder}: holds {foreign[0]}, which no cache-teacher wrote: move it away or name another folder"
        )


def begin(folder: str | Path, settings: Mapping[str, Any], overwrite: bool = False) -> bool:
    """Make a folder ready to be filled with these settings: a new one, or one that an unfinished run left.

    Args:
        settings: plain JSON.
        overwrite: remove an earlier cached teacher of other settings, or a damaged one.

    Returns:
        Whether it is complete already, with the same settings; then its files were compared with their hashes.

    Raises:
        ValueError: it holds something else, or was made with other settings (which, is said), or cannot be written.
    """
    folder = Path(folder)
    check_folder(folder)
    plain = json.loads(json.dumps(settings))
    try:
        if is_cached_teacher(str(folder)):
            complete = (folder / NAME).exists()
            try:
                before = Manifest.read(folder).settings if complete else _read(folder / UNFINISHED)["settings"]
                check_settings(folder, before, plain)
                if complete:
                    Manifest.read(folder).verify(folder)
                    (folder / UNFINISHED).unlink(missing_ok=True)  # a kill left it
                    return True
            except ValueError:
                if not overwrite:
                    raise
                _clear(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if _HALF.fullmatch(path.name):
                path.unlink()
        _write(folder / UNFINISHED, {"settings": plain})
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return False


def note_teacher(folder: Path, facts: Mapping[str, Any]) -> None:
    """Note in an unfinished folder what was found out about the teacher."""
    _write(folder / UNFINISHED, _read(folder / UNFINISHED) | {"teacher": facts})


def finish(folder: Path, shards: int, samples: int, response_tokens: int, index: str) -> Manifest:
    """Complete an unfinished folder, of which every shard is there: hash the files and write the manifest."""
    begun = _read(folder / UNFINISHED)
    names = [*([HEAD] if (folder / HEAD).exists() else []), *map(shard_name, range(shards))]
    files = [StoredFile.of(folder / name) for name in names]
    manifest = Manifest(begun["settings"], begun["teacher"], samples, response_tokens, index, files)
    manifest.write(folder)
    return manifest


def check_settings(folder: str | Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings. Raises ValueError that names the first that differs, and both values."""
    for path, then in _flat(before).items():
        if _flat(now).get(path) != then:
            raise ValueError(
                f"{folder}: was begun with {path} {then!r}, now it is {_flat(now).get(path)!r}: use the same settings "
                "to continue, overwrite (true) to begin anew, or name another folder"
            )
    if more := sorted(_flat(now).keys() - _flat(before).keys()):
        raise ValueError(f"{folder}: was begun without {more[0]}; overwrite (true) begins anew")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions of data, in words."""
    return [
        f"{path} ({_shown(before.get(path))}, here {_shown(now.get(path))})"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path)
    ]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _is_ours(name: str) -> bool:
    return name in (NAME, UNFINISHED, HEAD, TOKENIZER) or bool(_SHARD.fullmatch(name) or _HALF.fullmatch(name))


def _clear(folder: Path) -> None:
    """Remove all of a cached teacher; what says that it is ours goes last, so that a kill leaves no riddle."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name in (NAME, UNFINISHED)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write(path: Path, fields: Mapping[str, Any]) -> None:
    """Plain JSON with its format and a check sum."""
    whole = {"format": FORMAT, **fields}
    with atomic_write(path) as file:
        file.write(json.dumps(whole | {"check": _check_sum(whole)}, indent=1, sort_keys=True).encode() + b"\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
        if not isinstance(fields, dict) or fields.pop("check", None) != _check_sum(fields):
            raise ValueError
    except ValueError as error:
        raise ValueError(f"{path}: is no manifest of a cached teacher, or is damaged") from error
    if (found := fields.pop("format", None)) != FORMAT:
        raise ValueError(f"{path}: is of the format {found!r}, expected {FORMAT!r}: cache the teacher again")
    return fields


def _check_sum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
