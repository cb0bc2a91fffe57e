"""The command `lightning-itk`."""

import functools
import gc
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from types import NoneType
from typing import Any, get_args, get_type_hints

from lightning_itk import __version__

# name -> (module, function, one line for --help)
COMMANDS = {
    "quickstart": ("toy.quickstart", "quickstart", "train, distil and align tiny models on toy data; no downloads"),
    "select": ("cli.select", "select_records", "choose records by their learning percentage, from a scores file"),
    "choose-teacher": ("cli.choose_teacher", "choose_teacher", "rank candidate teachers by their responses"),
    "generate": ("cli.generate", "generate_responses", "write a model's responses to the prompts of a file"),
    "compare": ("cli.compare", "compare_runs", "compare runs record by record, from the files of RecordResults"),
    "prune": ("cli.prune", "prune_model", "make a smaller student out of a model: some of its layers or experts"),
    "export": ("cli.export", "export_checkpoint", "turn a checkpoint into a Hugging Face folder"),
}
# command -> the argument that may stand without its name
POSITIONAL = {"compare": "runs"}
# Commands that take the configuration of fit; name -> (module, function, one line for --help)
CONFIGURED = {
    "plan": ("cli.plan", "plan", "memory, work and time of a configuration's step, before it is run"),
    "cache-teacher": (
        "cli.cache_teacher",
        "cache_teacher",
        "run a configuration's teachers once, for many students",
    ),
    "tokenize": (
        "cli.tokenize",
        "tokenize_data",
        "fill the token caches of a configuration; --shard i/n: a part, from any scheduler",
    ),
}
STAGES = {
    "fit": "train",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "answer the prompts of data.predict",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; what the user got wrong becomes one line on stderr and exit code 1.

    Set ITK_TRACEBACK=1 to see where an error comes from.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        _print_help()
        return 0
    if args[0] == "--version":
        print(f"lightning-itk {__version__}")
        return 0
    try:
        return _loaded(args[0])(args)
    except Exception as error:
        if os.environ.get("ITK_TRACEBACK"):
            raise
        if not _is_users(error):
            print("lightning-itk: this looks like a bug; ITK_TRACEBACK=1 shows the whole trace", file=sys.stderr)
        print(f"lightning-itk: error: {_one_line(error)}", file=sys.stderr)
        return 1
    except SystemExit as stop:  # jsonargparse: --help is 0, a bad argument has printed its line
        return 0 if stop.code in (0, None) else 1
    except KeyboardInterrupt:
        print("lightning-itk: interrupted", file=sys.stderr)
        return 130


def _print_help() -> None:
    print("usage: lightning-itk COMMAND [--config FILE] [options] | --version\n\ncommands (each has its own --help):")
    for name, text in {**STAGES, **{name: entry[2] for name, entry in (CONFIGURED | COMMANDS).items()}}.items():
        print(f"  {name:<16}{text}")


def _loaded(name: str) -> Callable[[list[str]], int]:
    """What runs a command, all that it needs imported.

    Imports make a million objects that stay. In a process of its own the garbage collector never looks at them: that
    would take a quarter of the time until the first step.
    """
    known = [*STAGES, *CONFIGURED, *COMMANDS]
    if name not in known:
        raise ValueError(f"unknown command {name!r}; there are {', '.join(known)}")
    own_process = "torch" not in sys.modules
    if own_process:
        gc.disable()
    try:
        _quiet()
        if name in COMMANDS:
            module, function, _ = COMMANDS[name]
            return functools.partial(_command, getattr(import_module(f"lightning_itk.{module}"), function))
        if name in CONFIGURED:
            module, function, _ = CONFIGURED[name]
            run = getattr(import_module(f"lightning_itk.{module}"), function)
            return functools.partial(_stage, lambda args: run(args[1:]))
        from lightning_itk.cli.fit import InstructionCLI

        return functools.partial(_stage, InstructionCLI.start)
    finally:
        if own_process:
            gc.freeze()
            gc.enable()


def _command(function: Callable[..., Any], args: list[str]) -> int:
    from jsonargparse import auto_cli

    name, *args = args
    if name in POSITIONAL:
        first = next((place for place, arg in enumerate(args) if arg.startswith("-")), len(args))
        args = [f"--{POSITIONAL[name]}+={value}" for value in args[:first]] + args[first:]
    command, prog = _without_nulls(function), f"lightning-itk {name}"
    try:
        result = auto_cli(command, args=args, prog=prog, exit_on_error=False, as_positional=False)
    except TypeError as error:  # the parser hands on fields of what it takes for a class
        if field := re.search(r"unexpected keyword argument '(\w+)\.(\w+)", str(error)):
            raise ValueError(f"{field[1]} has no field {field[2]}, expected a path or {{path, …}}") from None
        raise
    return result if isinstance(result, int) else 0


def _without_nulls(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command that refuses null for what cannot be; the parser takes it for anything."""
    hints = get_type_hints(command)

    @functools.wraps(command)
    def checked(**given: Any) -> Any:
        for name, value in given.items():
            hint = hints.get(name, Any)
            if value is None and hint is not Any and NoneType not in get_args(hint):
                raise ValueError(f"{name} is null, expected a value")
        return command(**given)

    return checked


def _stage(start: Callable[[list[str]], Any], args: list[str]) -> int:
    # So that class_path finds a module beside the configuration; last, so it hides nothing.
    sys.path.append(os.getcwd())
    start(args)
    return 0


def _is_users(error: Exception) -> bool:
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    kinds = ValueError | OSError | ArgumentError | ImportError | MisconfigurationException
    said = ("Early stopping conditioned on metric", "checkpoint contains only the model")
    return isinstance(error, kinds) or any(words in str(error) for words in said)


# What jsonargparse says around the reason: that it tried a union, with which types, on which whole value.
_AROUND = re.compile(
    r"- Expected a <class 'NoneType'>|- Expected a path but|(- )?Does not validate against any of the Union|Subtypes:|"
    r"Errors:|Given value"
)


def _one_line(error: Exception) -> str:
    """What went wrong, without the layers that frameworks put around it."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line.removeprefix("- ") for line in lines if line and not _AROUND.match(line)]
    text = " ".join(telling) or " ".join(lines) or type(error).__name__
    return text if len(text) <= 1000 else f"{text[:700]} … {text[-250:]}"  # some show the whole configuration


# Beginnings of what libraries warn of each other, or of what is meant to be so; everything else is shown.
_HIDDEN = (
    r"LightningCLI's args parameter is intended to run from within Python",  # that is what `main(args)` is
    r"No seed found, seed set to",  # said again by Lightning in one line
    r"\s*By default only one JsonargparseDeprecationWarning",
    r"\s*``(ArgumentParser\.add_instantiator|instantiate_classes)`` was deprecated",
    r"\s*skip_none parameter was deprecated",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated",
    r"Found \d+ module\(s\) in eval mode at the start of training",  # teachers
    r"Total length of `(list|PieceLoader)` across ranks is zero",  # no validation data; a teacher has run already
    r"You have overridden `transfer_batch_to_device` in `LightningModule`",  # a data module with its own is asked first
)


def _quiet() -> None:
    """No bars for loading weights, and none of the warnings that nobody can act upon."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    for message in _HIDDEN:
        warnings.filterwarnings("ignore", message=message)
