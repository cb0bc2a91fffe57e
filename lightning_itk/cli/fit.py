"""fit, validate, test and predict: Lightning's own CLI with this kit's modules and defaults."""

import logging
from itertools import chain, count
from pathlib import Path
from pickle import UnpicklingError
from pydoc import locate
from typing import Any, Self

from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.imports import module_available

from lightning_itk.callbacks import ResponseWriter, RunCard
from lightning_itk.data.module import InstructionDataModule
from lightning_itk.methods.module import InstructionModule
from lightning_itk.models.checkpoint import read_checkpoint
from lightning_itk.models.sharded import check_sharded, is_sharded
from lightning_itk.models.sharded_loading import deferred_loading
from lightning_itk.trainer import log_folder


class InstructionCLI(LightningCLI):
    """`LightningCLI` for instruction tuning: modules by class_path, optimizers as arguments of the module."""

    @classmethod
    def start(cls, args: list[str] | None = None, run: bool = True) -> Self:
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_adverts)
        return cls(
            InstructionModule,
            InstructionDataModule,
            subclass_mode_model=True,
            subclass_mode_data=False,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            parser_kwargs={"parser_mode": "omegaconf", "exit_on_error": False},
            trainer_defaults={
                "log_every_n_steps": 10,
                "enable_model_summary": False,  # RunCard says more
                "num_sanity_val_steps": 1,  # the longest samples come first: what they prove needs no second batch
            },
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        text = "Folder of the default logger; null = trainer.default_root_dir, else runs."
        parser.add_argument("--log_dir", type=str | None, default=None, help=text)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skipped | {"weights_only"} for name, skipped in LightningCLI.subcommands().items()}

    def _parse_ckpt_path(self) -> None:
        path = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        if path and Path(path).is_file():
            read_checkpoint(path)  # one clear line, where Lightning would show a loader's inside
        elif path and Path(path).is_dir():
            check_sharded(path)
        super()._parse_ckpt_path()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        path = kwargs.get("ckpt_path")
        if path == "last":
            kwargs["ckpt_path"] = str(self._last_checkpoint())
        elif path and path not in ("best", "hpc", "registry") and "://" not in path and not Path(path).exists():
            raise ValueError(f"{path}: no such checkpoint")
        return kwargs | {"weights_only": True}  # of no checkpoint, wherever it comes from, is anything executed

    def _run_subcommand(self, subcommand: str) -> None:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        cards = [card for card in callbacks if isinstance(card, RunCard) and card.memory is None]
        if subcommand == "fit" and cards and self.trainer.is_global_zero:
            from lightning_itk.cli.planned_run import foretold

            cards[0].memory = foretold(self)
        try:
            super()._run_subcommand(subcommand)
        except UnpicklingError as error:
            path = self.config[subcommand].get("ckpt_path")
            raise ValueError(f"{path}: is no checkpoint of this kit (UnpicklingError)") from error

    def _last_checkpoint(self) -> Path:
        """The newest checkpoint where this run would write its own: of any run with this log_dir."""
        logger, callbacks = self.trainer.logger, self.trainer.checkpoint_callbacks
        folders = {Path(folder) for callback in callbacks if (folder := getattr(callback, "dirpath", None))}
        if not folders:
            root = self.trainer.default_root_dir
            folders = {Path(root, "checkpoints") if logger is None else Path(logger.save_dir or root)}
        found = [path for folder in folders for path in folder.rglob("*.ckpt") if path.is_file() or is_sharded(path)]
        if not found:
            raise ValueError(f"ckpt_path is last, but there is no checkpoint in {', '.join(map(str, folders))}")
        return max(found, key=lambda path: path.stat().st_mtime)

    def _log_folder(self) -> str:
        get = self._get
        return get(self.config_init, "log_dir") or get(self.config_init, "trainer.default_root_dir") or "runs"

    def before_instantiate_classes(self) -> None:
        trainer = self._get(self.config, "trainer")
        if not isinstance(trainer, Namespace | dict):
            found = "null" if trainer is None else f"a {type(trainer).__name__}"
            raise ValueError(f"trainer is {found}, expected arguments of Lightning's Trainer; or leave it out")
        if self._get(self.config, "model.class_path").rpartition(".")[2] == "InstructionModule":
            raise ValueError(
                "model has no class_path, expected lightning_itk.SFTModule, lightning_itk.KDModule, "
                "lightning_itk.DAEModule or a subclass of yours"
            )

    def instantiate_classes(self) -> None:
        kind = locate(self._get(self.config, "trainer.strategy.class_path") or "")
        with deferred_loading(isinstance(kind, type) and issubclass(kind, ModelParallelStrategy)):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        if self._get(self.config_init, "trainer.logger") in (None, True):
            kwargs["logger"] = self._default_logger()
        callbacks = self._get(self.config_init, "trainer.callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        defaults: list[tuple[type[Callback], type[Callback]]] = [(RunCard, RunCard), (ResponseWriter, ResponseWriter)]
        if self._get(self.config_init, "trainer.enable_progress_bar") is not False:
            defaults.append((TrainingBar, ProgressBar))
        for default, kind in defaults:
            if not any(isinstance(callback, kind) for callback in callbacks):
                callbacks.append(default())
        kwargs["callbacks"] = callbacks
        return super().instantiate_trainer(**kwargs)

    def _default_logger(self) -> Logger:
        folder = self._log_folder()
        if module_available("tensorboard") or module_available("tensorboardX"):
            return TensorBoardLogger(folder, name=None)
        return CSVLogger(folder, name=None)


class TrainingBar(RichProgressBar):
    """Lightning's bar, right where only the steps are limited: there it names epoch -2 as the last, and takes the
    steps that are left for batches."""

    @property
    def total_train_batches(self) -> int | float:
        if self.trainer.max_epochs != -1 or self.trainer.max_steps < 1:
            return super().total_train_batches
        left = (self.trainer.max_steps - self.trainer.global_step) * self.trainer.accumulate_grad_batches
        return min(self.trainer.num_training_batches, left)

    def _get_train_description(self, current_epoch: int) -> str:
        text = super()._get_train_description(current_epoch)
        return text.replace("/-2", "   ") if self.trainer.max_epochs == -1 else text


class SaveConfig(SaveConfigCallback):
    """The configuration in the folder of the run's logs, beside any file of that name which is there already."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.already_saved:
            return
        folder = log_folder(trainer)
        names = chain(["config.yaml"], (f"config-{number}.yaml" for number in count(2)))
        free = next(name for name in names if not (folder / name).exists()) if trainer.is_global_zero else ""
        self.config_filename = trainer.strategy.broadcast(free)
        super().setup(trainer, pl_module, stage)


def _no_adverts(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
