"""`tokenize`: fill the token caches of a configuration, from one process or from a shard each of many."""

from collections.abc import Sequence

from jsonargparse import Namespace
from rich.console import Console

from lightning_itk.cli.configured import ConfiguredCLI, loading_of_student
from lightning_itk.data.pieces import Shard
from lightning_itk.hub import load_tokenizer


class TokenizeCLI(ConfiguredCLI):
    """Of fit's configuration only the data are used: no model is loaded, no device is asked for."""

    description = "Fill the token caches of a configuration of fit, from one process or from a shard each of many."
    _SHARD = "Which part to tokenize, i/n with i from 0 to n-1; all n make the caches together, in any order."
    options = (("shard", str, "0/1", _SHARD),)

    def instantiate_classes(self) -> None:
        config = self.config[self.config.subcommand].clone()
        self.shard = Shard.parse(config.pop("shard"))
        config.pop("trainer")
        model = config.pop("model").get("init_args") or Namespace()
        self.datamodule = self._parser(self.config.subcommand).instantiate_classes(config).data
        if self.datamodule._tokenizer is None and isinstance(student := model.get("student"), str):
            self.datamodule._tokenizer = load_tokenizer(student, **loading_of_student(model))

    def _run_subcommand(self, subcommand: str) -> None:
        found = self.datamodule.prepare_shard(self.shard)
        waiting = [(name, missing) for name, missing in found if missing]
        text = f"tokenized shard {self.shard}: {len(found) - len(waiting)} of {len(found)} caches are complete"
        if waiting:
            missing = sorted({number for _, numbers in waiting for number in numbers})
            shown = ", ".join(f"{number}/{self.shard.count}" for number in missing[:20])
            text += f"; {', '.join(name for name, _ in waiting)} still without shard {shown}"
            text += f" and {len(missing) - 20} more" if len(missing) > 20 else ""
        Console().print(text, soft_wrap=True, highlight=False)


def tokenize_data(args: Sequence[str]) -> None:
    """Tokenize what a configuration of `fit` names, or a shard's part of it.

    Args:
        args: those of `fit`, and shard.
    """
    TokenizeCLI.start(["fit", *args])
