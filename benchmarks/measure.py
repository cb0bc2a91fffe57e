"""How a number is made here: first the implementation must be right, then it is timed, then weighed.

A `Problem` is one shape of one subject with its fp64 reference; a provider makes a function for it. `measure` checks
the function against the reference (value and every gradient), and only a right one gets times and memory. Everything
that can go wrong (not installed, out of memory, an exception) becomes a row that says so.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from machine import clock, copy_bandwidth, flush_cache, gemm_rate
from memory import peak_mib
from problem import Inputs, Loss, Make, Makers, Problem, Truth, check, leaves_of, wrong
from providers import PROVIDERS
from settings import Settings, failures_as_rows, require

MODES = ("forward+backward", "forward", "eval")
FEWEST, PATIENCE = 10, 4.0  # samples; seconds after which no more than those are taken


def measure_all(problem: Callable[..., Problem], shapes: Iterable[Any], makers: Makers, settings: Settings) -> None:
    """All shapes of a subject; what has to be compiled for minutes takes part where a problem says so."""
    quick = {key: make for key, make in makers.items() if settings.device not in PROVIDERS[key].compiles}
    for one in (problem(shape, settings.dtype, settings.device) for shape in shapes):
        measure(one, makers if one.compiled or settings.tiny else quick, settings)


def made(key: str, make: Make, problem: Problem) -> Loss:
    """The function of a provider that has what it needs here."""
    require(key)
    return make(problem)


def repeated(settings: Settings) -> Iterator[None]:
    """As many samples as the settings say, or the fewest that do where they take long."""
    begin = time.monotonic()
    for taken in range(settings.samples):
        if taken >= FEWEST and time.monotonic() - begin > PATIENCE:
            return
        yield


def sample_ms(action: Callable[[], Any], settings: Settings) -> list[float]:
    """Milliseconds of single calls, each from a cold cache, sorted: device events, or processor time on a CPU."""
    device, times = settings.device, []
    for _ in range(settings.warmup):
        action()
    for _ in repeated(settings):
        if not settings.tiny:
            flush_cache(device)
        if device == "cuda":
            torch.cuda._sleep(2_000_000)  # a millisecond, in which the host gets ahead of the device
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            kept = action()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = clock(device)
            kept = action()
            times.append(1e3 * (clock(device) - begin))
        del kept
    return sorted(times)


def quantiles(times: list[float]) -> dict[str, float]:
    def at(share: float) -> float:
        return times[min(len(times) - 1, round(share * (len(times) - 1)))]

    return {"ms": at(0.5), "ms_p20": at(0.2), "ms_p80": at(0.8), "samples": len(times)}


def call(loss: Loss, inputs: Inputs, problem: Problem, mode: str) -> Callable[[], Any]:
    """One call of a mode. What it returns keeps alive what a training step would keep."""
    leaves = leaves_of(problem, inputs)

    def step() -> Any:
        if mode == "eval":
            with torch.no_grad():
                return loss(inputs)
        value = loss(inputs)
        if mode == "forward":
            return value
        return torch.autograd.grad(value, leaves, torch.full_like(value, 1 / problem.kept))

    return step


def measure(problem: Problem, makers: Makers, settings: Settings) -> None:
    """Rows of every provider and mode for one problem."""
    base = {"subject": problem.subject, "shape": problem.shape, "dtype": str(problem.dtype).removeprefix("torch.")}
    if settings.over:
        settings.add(**base, provider="all", mode="*", status="skipped", reason="time budget")
        return
    truth = full = None
    with failures_as_rows(settings, {**base, "provider": "reference", "mode": "*"}):
        truth = Truth.of(problem)
        full = problem.make(0, False)
        truth.add_rows(problem, full)
    if truth is None or full is None:
        return
    yard = None
    if problem.yardstick is not None:
        with failures_as_rows(settings, {**base, "provider": "yardstick", "mode": "forward+backward"}):
            yard = quantiles(sample_ms(lambda: problem.yardstick(full), settings))  # type: ignore[misc]
            settings.add(**base, provider="yardstick", mode="forward+backward", status="ok", **yard)
    for key, make in makers.items():
        row = {**base, "provider": key}
        if settings.over:
            settings.add(**row, mode="*", status="skipped", reason="time budget")
            continue
        with failures_as_rows(settings, {**row, "mode": "*"}):
            loss = made(key, make, problem)
            errors = check(loss, problem, truth)
            reason = wrong(errors, problem.dtype)
            if reason is not None:
                settings.add(**row, mode="*", status="wrong", reason=reason, **errors)
                continue
            for mode in MODES:
                if settings.over:
                    settings.add(**row, mode=mode, status="skipped", reason="time budget", **errors)
                    continue
                step = call(loss, full, problem, mode)
                with failures_as_rows(settings, {**row, "mode": mode, **errors}):
                    found = quantiles(sample_ms(step, settings))
                    memory = peak_mib(step, settings.device) if visible_memory(key, settings.device) else None
                    extra = floor(problem, mode, found["ms"], settings.device)
                    if yard is not None and mode == "forward+backward":
                        extra["times_yardstick"] = found["ms"] / yard["ms"]
                    settings.add(**row, mode=mode, status="ok", **found, memory_mib=memory, **extra, **errors)


def visible_memory(key: str, device: str) -> bool:
    """On a CPU the counter sees the results of operators; a fused operator's insides would count as nothing."""
    return device == "cuda" or not PROVIDERS[key].fused


def floor(problem: Problem, mode: str, ms: float, device: str) -> dict[str, float]:
    """The least time this machine needs, from the rates it reached in the same run."""
    operations, nbytes = problem.both if mode == "forward+backward" else problem.forward
    rate, bandwidth = gemm_rate(device, problem.dtype), copy_bandwidth(device)
    least = 1e3 * max(operations / rate, nbytes / bandwidth)
    return {
        "floor_ms": least,
        "percent_of_floor": 100 * least / ms,
        "gemm_tflops": rate / 1e12,
        "copy_gbs": bandwidth / 1e9,
    }


def compiled(function: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    """torch.compile, in the tiny form without the code generator (whose start-up would be all there is to see)."""
    if settings.tiny:
        return torch.compile(function, backend="aot_eager", dynamic=False)
    return torch.compile(function, dynamic=False)
