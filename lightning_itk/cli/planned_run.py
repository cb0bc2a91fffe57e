"""What a configuration of `fit` says about its step, and the line about it that `fit` itself prints."""

from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_itk.hub import first_line
from lightning_itk.methods.module import InstructionModule
from lightning_itk.planning.setting import Setting

_PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "None": "32-true"}


def foretold(cli: LightningCLI) -> str:
    """The peak memory of a rank of `fit`, simulated; or why it is not known. Looks at no device: processes may fork."""
    from lightning_itk.planning.estimate import GiB, peak
    from lightning_itk.planning.simulation import simulate

    config = cli.config.fit
    gpu = torch.cuda.is_available() and str(config.trainer.get("accelerator")) in ("auto", "gpu", "cuda")
    try:
        setting = read_setting(config, gpu=gpu)
        with isolate_rng():
            step = simulate(lambda: planned_module(cli, {}), setting, layers_in_a_group(config.model.init_args))
    except Exception as error:  # a run that cannot be foretold is none the worse
        return f"not known: {first_line(error)[:200]}"
    moment, parts = peak(step)
    return f"{sum(parts.values()) / GiB:.3g} GiB at its peak ({moment}), simulated"


def planned_module(cli: LightningCLI, changed: dict[str, Any]) -> InstructionModule:
    """A configuration's module, with its own optimizer and arguments."""
    model = cli.config.fit.model.clone()
    model.init_args.update(Namespace(impl="torch", compile=False, **changed))
    return cli._parser("fit").instantiate_classes(Namespace(model=model, data=cli.config.fit.data)).model


def read_setting(
    config: Namespace, *, gpu: bool, devices: int | None = None, nodes: int | None = None, response_share: float = 1.0
) -> Setting:
    """What of a configuration of `fit` decides memory.

    Args:
        devices, nodes: in place of the configuration's.

    Raises:
        ValueError: a precision or strategy that cannot be simulated.
    """
    trainer, data, init = config.trainer, config.data, config.model.init_args
    ranks = (devices or _count(trainer.get("devices"), gpu)) * (nodes or trainer.get("num_nodes") or 1)
    precision = str(trainer.get("precision"))
    precision = _PRECISIONS.get(precision, precision)
    if precision not in ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true"):
        raise ValueError(f"trainer.precision is {precision}: plan knows 32-true, bf16-mixed, bf16-true and 16-mixed")
    from lightning_itk.kernels.launch import KINDS

    return Setting(
        rows=data.batch_size,
        length=data.max_length,
        response_share=response_share,
        packing=bool(data.packing),
        accumulate=trainer.get("accumulate_grad_batches") or 1,
        precision=precision,
        strategy=_strategy(trainer.get("strategy"), ranks),
        ranks=ranks,
        gpu=gpu,
        triton=gpu and init.get("impl", "auto") != "torch" and init.get("kind", "forward") in KINDS,
    )


def _count(devices: Any, gpu: bool) -> int:
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    if str(devices).isdigit():
        return int(devices)
    return max(torch.cuda.device_count(), 1) if gpu else 1  # auto and -1: as many as there are


def _strategy(given: Any, ranks: int) -> str:
    name = str(given if isinstance(given, str) else given.class_path if given else "auto").rpartition(".")[2].lower()
    if "modelparallel" in name or name == "fsdp2strategy":
        return "fsdp2"
    if name == "auto" or name.startswith(("ddp", "single")):
        return "ddp" if ranks > 1 else "single"
    raise ValueError(f"trainer.strategy {name!r} cannot be simulated, expected auto, ddp or ModelParallelStrategy")


def layers_in_a_group(init: Namespace) -> int:
    """Layers come in groups where every n-th has the attention term; where some are named, no layer is like another."""
    layers = (init.get("attention") or {}).get("layers", "all")
    if layers == "all":
        return 1
    if isinstance(layers, str) and layers.removeprefix("every:").isdigit():
        return max(int(layers.removeprefix("every:")), 1)
    return 10**6
