"""fit, validate, test and predict: Lightning's own CLI with this kit's modules and defaults."""

import logging
from typing import Any

from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning_utilities.core.imports import module_available

from lightning_itk.callbacks import ResponseWriter, RunCard
from lightning_itk.data.module import InstructionDataModule
from lightning_itk.methods.module import InstructionModule


class InstructionCLI(LightningCLI):
    """`LightningCLI` for instruction tuning: modules by class_path, optimizers as arguments of the module."""

    @classmethod
    def start(cls, args: list[str] | None = None, run: bool = True) -> "InstructionCLI":
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_adverts)
        return cls(
            InstructionModule,
            InstructionDataModule,
            subclass_mode_model=True,
            subclass_mode_data=False,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"parser_mode": "omegaconf", "exit_on_error": False},
            trainer_defaults={"log_every_n_steps": 10, "enable_model_summary": False},  # RunCard says more
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--log_dir", type=str, default="runs", help="Folder of the default logger.")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        if self._get(self.config_init, "trainer.logger") in (None, True):
            kwargs["logger"] = self._default_logger()
        callbacks = self._get(self.config_init, "trainer.callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        defaults: list[tuple[type[Callback], type[Callback]]] = [(RunCard, RunCard), (ResponseWriter, ResponseWriter)]
        if self._get(self.config_init, "trainer.enable_progress_bar") is not False:
            defaults.append((RichProgressBar, ProgressBar))
        for default, kind in defaults:
            if not any(isinstance(callback, kind) for callback in callbacks):
                callbacks.append(default())
        kwargs["callbacks"] = callbacks
        return super().instantiate_trainer(**kwargs)

    def _default_logger(self) -> Logger:
        folder = self._get(self.config_init, "log_dir")
        if module_available("tensorboard") or module_available("tensorboardX"):
            return TensorBoardLogger(folder, name=None)
        return CSVLogger(folder, name=None)


def _no_adverts(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
