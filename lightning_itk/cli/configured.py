"""Commands that take a configuration of `fit`, and options of their own."""

from typing import Any, ClassVar

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_itk.cli.fit import InstructionCLI

Option = tuple[str, Any, Any, str]  # name, type, default, help


class ConfiguredCLI(InstructionCLI):
    """Reads what `fit` reads. Nothing is made of it and nothing runs, unless a command says so."""

    description: ClassVar[str]
    options: ClassVar[tuple[Option, ...]]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.description = self.description
        for name, kind, default, text in self.options:
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def loading_of_student(init: Namespace) -> dict[str, Any]:
    """How a configuration's student is read, but for its name: arguments of `hub.load_tokenizer` and the like.

    Args:
        init: of the model.
    """
    return {
        "trust_remote_code": bool(init.get("trust_remote_code")),
        "model_kwargs": plain(init.get("student_kwargs")),
    }


def plain(kwargs: Any) -> dict[str, Any] | None:
    """Arguments as the parser holds them, as a dict."""
    return kwargs.as_dict() if isinstance(kwargs, Namespace) else kwargs
