"""How long a run looks, and where its rows go; whatever goes wrong becomes a row too."""

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from machine import describe
from providers import PROVIDERS


class Unavailable(Exception):
    """This implementation cannot take part here; the message says why."""


@dataclass
class Settings:
    """How long to look."""

    device: str = "cpu"
    samples: int = 20
    warmup: int = 3
    tiny: bool = False
    deadline: float = float("inf")  # time.monotonic() after which nothing new is started
    model: str | None = None  # folder of the whole runs' model, or "whole"
    student: str | None = None  # folder of a student of it
    data: str | None = None  # file of records for that model
    rows: list[dict[str, Any]] = field(default_factory=list)
    emit: Callable[[dict[str, Any]], None] = lambda row: None

    def add(self, **row: Any) -> None:
        """A finished row; its provider is known by its key up to here and by its name from here on."""
        shown = PROVIDERS[row["provider"]].name(self.device)
        row = {**row, "provider": shown, **describe(self.device)}
        self.rows.append(row)
        self.emit(row)

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def pick(self, tiny: Any, cpu: Any, full: Any) -> Any:
        """The sizes of this run."""
        return tiny if self.tiny else full if self.device == "cuda" else cpu


def require(key: str) -> None:
    """Raise where a provider lacks what it needs: ImportError for its package, Unavailable for a GPU."""
    provider = PROVIDERS[key]
    if provider.package is not None:
        importlib.import_module(provider.package.replace("-", "_"))
    if provider.gpu is not None and not torch.cuda.is_available():
        raise Unavailable(provider.gpu)


@contextlib.contextmanager
def failures_as_rows(settings: Settings, row: dict[str, Any]) -> Iterator[None]:
    """Turn whatever goes wrong inside into one row."""
    try:
        yield
        return
    except Unavailable as error:
        status, reason = "not available", str(error)
    except ImportError as error:
        status, reason = "not installed", str(error)
    except torch.OutOfMemoryError as error:
        status, reason = "out of memory", _first_line(error)
    except Exception as error:  # a peer may fail in any way; the others still get their numbers
        status, reason = "failed", f"{type(error).__name__}: {_first_line(error)}"
    settings.add(**row, status=status, reason=reason)
    if settings.device == "cuda":
        with contextlib.suppress(RuntimeError):  # raises again what broke the device
            torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
