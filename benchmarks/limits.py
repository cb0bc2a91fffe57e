"""How far it goes: the most tokens and the longest sequence whose loss and gradients fit into memory."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import attention_kl
import linear_kl
import torch
from machine import synchronize
from measure import call, made, visible_memory
from memory import peak_mib
from problem import Make, Problem
from providers import PROVIDERS
from settings import Settings, Unavailable

CPU_MIB = 2048  # a CPU run stops here instead of filling the machine


def tokens(count: int, settings: Settings) -> Problem:
    hidden, teacher, vocab = (2048, 4096, 128256) if settings.device == "cuda" else (64, 96, 8192)
    shape = linear_kl.Shape(count, hidden, teacher, vocab)
    return linear_kl.problem(shape, settings.dtype, settings.device)


def length(count: int, settings: Settings) -> Problem:
    size = (32, 4, 128, 128) if settings.device == "cuda" else (2, 2, 32, 32)
    return attention_kl.problem(attention_kl.Shape(1, count, *size), settings.dtype, settings.device)


def run(settings: Settings) -> None:
    first = settings.pick(64, 512, 1024)
    subjects = {
        "linear_kl": (tokens, linear_kl.providers(settings), "tokens"),
        "attention_kl": (length, attention_kl.providers(settings), "length"),
    }
    for subject, (size, makers, unit) in subjects.items():
        for key, make in makers.items():
            row = {"subject": "limits", "provider": key, "shape": {"subject": subject, "unit": unit}}
            if PROVIDERS[key].compiles or not visible_memory(key, settings.device):
                reason = "a new shape at every step would only time the compiler"
                settings.add(**row, status="not available", reason=reason)
                continue
            _climb(row, partial(size, settings=settings), partial(made, key, make), first, settings)


def _climb(row: dict[str, Any], sized: Callable[[int], Problem], make: Make, first: int, settings: Settings) -> None:
    """Double the size until memory, time or patience ends; the row holds the last size that fitted."""
    cap, seconds = (2 * first, 5.0) if settings.tiny else (2**20, 3.0 if settings.device == "cuda" else 8.0)
    size, fitted, peak, stopped = first, 0, 0.0, "cap"
    while size <= cap:
        problem = inputs = step = None
        try:
            problem = sized(size)
            loss = make(problem)
            inputs = problem.make(0, False)
            step = call(loss, inputs, problem, "forward+backward")
            if settings.device == "cuda":
                step()  # compiles and tunes
                synchronize(settings.device)
            start = time.monotonic()
            step()
            synchronize(settings.device)
            taken = time.monotonic() - start
            mib = peak_mib(step, settings.device)  # counting on a CPU takes time of its own
        except (Unavailable, ImportError) as error:
            settings.add(**row, status="not available", reason=str(error))
            return
        except torch.OutOfMemoryError:
            stopped = "out of memory"
            break
        except Exception as error:  # a peer's own limit
            stopped = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            break
        finally:
            del problem, inputs, step
            if settings.device == "cuda":
                torch.cuda.empty_cache()
        if settings.device == "cpu" and mib > CPU_MIB:
            stopped = f"more than {CPU_MIB} MiB"
            break
        fitted, peak = size, mib
        if taken > seconds:
            stopped = f"a call takes more than {seconds:.0f} s"
            break
        if settings.over:
            stopped = "the time budget ends"
            break
        size *= 2
    settings.add(**row, status="ok", largest=fitted, memory_mib=peak, stopped=stopped)
