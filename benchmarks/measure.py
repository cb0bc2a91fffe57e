"""How a number is made here: first the implementation must be right, then it is timed, then weighed.

A `Problem` is one shape of one subject with its fp64 reference; a provider makes a function for it. `measure` checks
the function against the reference (value and every gradient), and only a right one gets times and memory. Everything
that can go wrong (not installed, out of memory, an exception) becomes a row that says so.
"""

import contextlib
import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from machine import clock, copy_bandwidth, describe, flush_cache, gemm_rate
from memory import peak_mib
from providers import PROVIDERS
from torch import Tensor

Inputs = dict[str, Any]
Loss = Callable[[Inputs], Tensor]
MODES = ("forward+backward", "forward", "eval")
VALUE_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.02}
GRADIENT_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Relative errors from which an implementation counts as wrong and gets no number. Wide in half precision: how wrong it
is stands in every row, and `accuracy.py` shows what becomes of it as student and teacher get closer."""


class Unavailable(Exception):
    """This implementation cannot take part here; the message says why."""


@dataclass
class Problem:
    """One shape of one subject.

    Args:
        shape: what goes into the row.
        make: `(seed, small) -> inputs`; small = the same kind with fewer rows, for the fp64 reference.
        leaves: the inputs that get a gradient; the first one's rows are the problem's rows.
        reference: `(inputs, rows | None) -> summed loss` in plain torch, of these rows only.
        rows: how many rows the first leaf has, counted along the axis that `row_axis` names.
        kept: rows that count; the upstream gradient is 1 / kept, as a trainer's mean makes it.
        forward, both: fewest floating-point operations and fewest bytes, of a forward and of forward + backward.
        compiled: whether torch.compile is worth its minutes at this shape.
        yardstick: another operation of the same shape whose time the rows are divided by.
    """

    subject: str
    shape: dict[str, Any]
    dtype: torch.dtype
    make: Callable[[int, bool], Inputs]
    leaves: tuple[str, ...]
    reference: Callable[[Inputs, Tensor | None], Tensor]
    kept: int
    forward: tuple[float, float]
    both: tuple[float, float]
    row_axis: int = 0
    compiled: bool = False
    yardstick: Loss | None = None


Make = Callable[[Problem], Loss]
Makers = Mapping[str, Make]
"""How each provider is made in a subject, by its key."""


@dataclass
class Settings:
    """How long to look."""

    device: str = "cpu"
    samples: int = 20
    warmup: int = 3
    tiny: bool = False
    deadline: float = float("inf")  # time.monotonic() after which nothing new is started
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


def relative_error(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def leaves_of(problem: Problem, inputs: Inputs) -> list[Tensor]:
    return [inputs[name].requires_grad_() for name in problem.leaves]


def widened(inputs: Inputs) -> Inputs:
    """The same numbers in fp64, detached."""
    return {
        name: value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


@dataclass
class Truth:
    """The fp64 answers to one problem: the whole of a small one, and some rows of the full one."""

    small: Inputs
    value: float
    gradients: list[Tensor]
    per_row: float  # the loss of a kept row, which says how far apart student and teacher are
    upstream: float
    full: Inputs | None = None
    rows: Tensor | None = None
    row_gradient: Tensor | None = None

    @classmethod
    def of(cls, problem: Problem) -> "Truth":
        small = problem.make(1, True)
        exact = widened(small)
        leaves = leaves_of(problem, exact)
        value = problem.reference(exact, None)
        kept = int(small.get("kept", problem.kept))
        gradients = torch.autograd.grad(value, leaves, torch.full_like(value, 1 / kept))
        return cls(small, value.item(), [g.detach() for g in gradients], value.item() / kept, 1 / kept)

    def add_rows(self, problem: Problem, full: Inputs) -> None:
        """A row's gradient depends on that row alone, so a few rows of the full size can be checked exactly."""
        count = full[problem.leaves[0]].shape[problem.row_axis]
        rows = torch.linspace(0, count - 1, 8).long().unique()
        exact = widened(full)
        leaf = exact[problem.leaves[0]].requires_grad_()
        value = problem.reference(exact, rows.to(leaf.device))
        (gradient,) = torch.autograd.grad(value, leaf, torch.full_like(value, 1 / problem.kept))
        self.full, self.rows = full, rows.to(leaf.device)
        self.row_gradient = gradient.index_select(problem.row_axis, self.rows)


def measure_all(problem: Callable[..., Problem], shapes: Iterable[Any], makers: Makers, settings: Settings) -> None:
    """All shapes of a subject; what has to be compiled for minutes takes part where a problem says so."""
    quick = {key: make for key, make in makers.items() if settings.device not in PROVIDERS[key].compiles}
    for one in (problem(shape, settings.dtype, settings.device) for shape in shapes):
        measure(one, makers if one.compiled or settings.tiny else quick, settings)


def made(key: str, make: Make, problem: Problem) -> Loss:
    """The function of a provider that has what it needs here."""
    provider = PROVIDERS[key]
    if provider.package is not None:
        importlib.import_module(provider.package.replace("-", "_"))
    if provider.gpu is not None and not torch.cuda.is_available():
        raise Unavailable(provider.gpu)
    return make(problem)


def check(loss: Loss, problem: Problem, truth: Truth) -> dict[str, Any]:
    """Relative errors of the value and of the worst gradient, and of some rows at the full size."""
    leaves = leaves_of(problem, truth.small)
    value = loss(truth.small)
    gradients = torch.autograd.grad(value, leaves, torch.full_like(value, truth.upstream))
    errors = [relative_error(g, e) for g, e in zip(gradients, truth.gradients, strict=True)]
    found = {
        "value_error": abs(value.item() - truth.value) / abs(truth.value),
        "gradient_error": max(errors, key=lambda error: float("inf") if error != error else error),
        "kl": truth.per_row,
        "gradient_errors": dict(zip(problem.leaves, errors, strict=True)),
    }
    if truth.full is not None and truth.rows is not None and truth.row_gradient is not None:
        leaf = leaves_of(problem, truth.full)[0]
        value = loss(truth.full)
        (gradient,) = torch.autograd.grad(value, leaf, torch.full_like(value, 1 / problem.kept))
        found["gradient_error_full"] = relative_error(
            gradient.index_select(problem.row_axis, truth.rows), truth.row_gradient
        )
    return found


def wrong(errors: Mapping[str, Any], dtype: torch.dtype) -> str | None:
    """Why this implementation gets no number, or None."""
    limits = {"value_error": VALUE_LIMIT, "gradient_error": GRADIENT_LIMIT, "gradient_error_full": GRADIENT_LIMIT}
    for name, limit in limits.items():
        if name in errors and not errors[name] <= limit[dtype]:
            return f"{name} {errors[name]:.1e} is above {limit[dtype]:.0e}"
    return None


def sample_ms(action: Callable[[], Any], settings: Settings) -> list[float]:
    """Milliseconds of single calls, each from a cold cache, sorted: device events, or processor time on a CPU."""
    device, times = settings.device, []
    for _ in range(settings.warmup):
        action()
    for _ in range(settings.samples):
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
