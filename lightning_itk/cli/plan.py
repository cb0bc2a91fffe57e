"""`plan`: does a run fit, how long is a step, and what makes it fit; before any device is booked."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from lightning_itk.cli.configured import ConfiguredCLI
from lightning_itk.cli.planned_data import learned_tokens
from lightning_itk.cli.planned_run import layers_in_a_group, planned_module, read_setting
from lightning_itk.files import atomic_write
from lightning_itk.methods.module import InstructionModule
from lightning_itk.outputs import check_output, note_output
from lightning_itk.planning.devices import SHARE_OF_PEAK, SPARE, device
from lightning_itk.planning.estimate import GiB, Plan, fits, host_bytes, peak, seconds, suggestions
from lightning_itk.planning.setting import Setting
from lightning_itk.planning.simulation import simulate


class PlanCLI(ConfiguredCLI):
    """Only read: not even a seed is set."""

    description = "Simulate an optimizer step of a configuration of fit: its memory, work and time."
    options = (
        ("devices", int | None, None, "Devices of a node; null = those of the configuration."),
        ("nodes", int | None, None, "Nodes; null = those of the configuration."),
        ("device", str, "h100", "Kind of device: h100, h200, a100-80, a100-40, l40s, rtx4090, b200, mi300x, cpu."),
        ("response_share", float, 1.0, "Share of positions that are learned; 1 = the most that can be."),
        ("output", str | None, None, "JSON file for the same figures."),
        ("overwrite", bool, False, "Replace what an earlier plan wrote; nothing else ever."),
    )

    def _set_seed(self) -> None:
        pass


def plan(args: Sequence[str]) -> None:
    """Print what an optimizer step of a configuration needs on a device, and what to change where it does not fit.

    Args:
        args: those of `fit`, and devices, nodes, device, response_share, output, overwrite.

    Raises:
        ValueError: what the user got wrong, in one line.
    """
    if {"-h", "--help"} & {*args}:
        print("usage: lightning-itk plan --config FILE [options, and any of fit's]\n")
        for name, _, default, text in PlanCLI.options:
            print(f"  --{name:<16}{text} (default: {default})")
        return
    cli = PlanCLI.start(["fit", *args])
    config = cli.config.fit
    kind = device(config.device)
    if config.output is not None:
        check_output(config.output, config.overwrite)
    for name, value in (("devices", config.devices), ("nodes", config.nodes)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected 1 or more")
    if not 0 < config.response_share <= 1:
        raise ValueError(f"response_share is {config.response_share}, expected a share above 0, at most 1")
    own = {name: config[name] for name in ("devices", "nodes", "response_share")}
    setting, init = read_setting(config, **own, gpu=config.device != "cpu"), config.model.init_args
    every = layers_in_a_group(init)

    def build(_: Setting, changed: dict[str, Any]) -> Callable[[], InstructionModule]:
        return lambda: planned_module(cli, changed)

    step = simulate(build(setting, {}), setting, every)
    moment, parts = peak(step)
    total, (time, bound) = sum(parts.values()), seconds(step, kind, setting.precision)
    tokens = setting.rows * setting.length * setting.accumulate * setting.ranks
    learned, teachers = learned_tokens(config.data, init), len(step.weights) > 1
    facts: dict[str, Any] = {
        "peak_bytes": round(total),
        "parts": {name: round(value) for name, value in parts.items()},
        "moment": moment,
        "moments": {name: round(sum(values.values())) for name, values in step.peaks.items()},
        "fits": fits(step, kind),
        "device": {"name": config.device, **kind._asdict()},
        "share_of_peak": SHARE_OF_PEAK,
        "ranks": setting.ranks,
        "strategy": setting.strategy,
        "flops": round(step.flops),
        "traffic_bytes": round(step.traffic),
        "seconds": time,
        "bound": bound,
        "tokens_per_second": tokens / time,
        "host_bytes": round(host_bytes(step, setting)),
        "cache_bytes": None if learned is None or not teachers else learned * sum(_state_bytes(step)),
        "suggestions": [],
    }
    if not facts["fits"]:
        given = {"gradient_checkpointing": bool(init.get("gradient_checkpointing"))}
        can_cache = teachers and not (init.get("attention") and init.attention.get("weight"))
        found = suggestions(Plan(setting, given), build, kind, every, can_cache)
        facts["suggestions"] = [{"change": s.text, "peak_bytes": round(s.peak)} for s in found]
    _print(facts, setting, config)
    if config.output is not None:
        with atomic_write(Path(config.output)) as file:
            file.write(json.dumps(facts, indent=2).encode() + b"\n")
        note_output(config.output)


def _state_bytes(step: Any) -> list[int]:
    return [2 * hidden for hidden in step.hidden[1:]]  # bf16


def _print(facts: dict[str, Any], setting: Setting, config: Namespace) -> None:
    console, name = Console(), config.device
    title = f"{config.model.class_path.rpartition('.')[2]} on {setting.ranks} x {name}"
    table = Table(title=title, title_justify="left")
    table.add_column(f"peak of a rank ({facts['moment']})")
    table.add_column("GiB", justify="right")
    for part, value in facts["parts"].items():
        table.add_row(part, f"{value / GiB:.2f}")
    table.add_section()
    table.add_row("peak", f"{facts['peak_bytes'] / GiB:.2f}")
    table.add_row(f"{name}, {1 - SPARE:.0%} left for context and allocator", f"{SPARE * facts['device']['memory']:.2f}")
    console.print(table)
    rate = facts["device"]["tflops_fp32" if setting.precision.startswith("32") else "tflops"]
    loads = "its own rows" if setting.strategy == "fsdp2" else "as every rank loads every model whole"
    lines = [
        f"step: {setting.rows} rows of {setting.length} tokens x {setting.accumulate} micro-batches x {setting.ranks} "
        f"ranks ({setting.strategy}, {setting.precision}), {setting.response_share:.0%} of the tokens learned",
        f"work of a rank: {facts['flops'] / 1e12:.3g} TFLOP, {facts['traffic_bytes'] / 1e9:.3g} GB through memory",
        f"time: {facts['seconds']:.3g} s, {facts['tokens_per_second']:,.0f} tokens/s; bound by {facts['bound']} at "
        f"{SHARE_OF_PEAK:.0%} of {rate:g} TFLOP/s and {facts['device']['bandwidth']:g} GB/s "
        f"({facts['device']['source']}); traffic between ranks is not in it",
        f"host RAM while loading: {facts['host_bytes'] / GiB:.2f} GiB a rank, {loads}",
    ]
    if facts["cache_bytes"] is not None:
        lines.append(f"cached teacher on disk: about {facts['cache_bytes'] / GiB:.2f} GiB of states (bf16)")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    verdict = "fits" if facts["fits"] else "does not fit"
    console.print(
        f"{verdict}: {facts['peak_bytes'] / GiB:.2f} GiB of {facts['device']['memory']:g} GiB on {name}",
        soft_wrap=True,
        highlight=False,
    )
    for each in facts["suggestions"]:
        text = f"  fits with {each['change']}: {each['peak_bytes'] / GiB:.2f} GiB"
        console.print(text, soft_wrap=True, highlight=False)
    if not facts["fits"] and not facts["suggestions"]:
        console.print("  no single change that plan knows makes it fit: take a smaller model or LoRA", soft_wrap=True)
