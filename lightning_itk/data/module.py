"""InstructionDataModule: read, check, tokenize, cache, mix, choose a subset, batch, resume."""

from typing import Any, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_itk.data.loader import ResumableLoader, SampleSet
from lightning_itk.data.order import numbers
from lightning_itk.data.prepared import PreparedData
from lightning_itk.data.records import DataError, Invalid
from lightning_itk.data.sampler import BatchSampler, MixedSource
from lightning_itk.data.sources import Sources, as_sources
from lightning_itk.data.special_tokens import SpecialTokens
from lightning_itk.data.subset import Subset
from lightning_itk.data.template import read_template
from lightning_itk.data.tools import Tools
from lightning_itk.trainer import replica


class InstructionDataModule(PreparedData):
    """Batches of instruction data from JSON, JSON Lines (also .gz, .zst) and Parquet files or hub data sets.

    Records are conversations (`messages`), Alpaca (`instruction`, `input`, `output`), Dolly (`instruction`, `context`,
    `response`) or `prompt` with `completion`. Every assistant turn is learned, its stop token included, and nothing
    else. The tokens are cached on disk; samples without a learned token left after truncation are dropped and counted.

    Args:
        train: A file, folder, glob, URL (s3://, gs://, hf://, …) or hub name, or several; each may be {path, teacher,
            weight, columns, split} (or a `Source`).
        validation: A share of the training samples (0 = none), or files like `train`.
        test: Files like `train` for the test loop; null = the validation samples, which a warning says.
        predict: Files of prompts for the predict loop; responses in them are ignored.
        tokenizer: Folder or hub name of the tokenizer (in Python also a loaded one); null = the student's.
        chat_template: A Jinja chat template, or a file that holds one; null = the tokenizer's own, else the Alpaca
            prompt.
        max_length: Tokens per sample, and per row when packing. Longer conversations are cut on the right.
        batch_size: Rows per micro-batch and rank. A row is a sample, or a pack of up to max_length tokens.
        eval_batch_size: Samples per batch in validation, test, predict and scoring; null = batch_size.
        shuffle: A new order every epoch; false keeps the order of the records.
        packing: Fill rows with several samples, without padding and without attention between them.
        subset: Train on a part of the samples, chosen by recorded response losses.
        num_workers: Processes that prepare batches.
        num_proc: Processes that tokenize; null = one per usable core.
        cache_dir: Folder of the token caches; null = $ITK_CACHE, else ~/.cache/lightning_itk.
        invalid: What becomes of records that cannot be used (an empty response, a missing field): refuse = an error
            that names the first; drop = they are left out, counted by reason, and the first ten are named.
        special_tokens: What names of special tokens in a record's text are: text = text, only those that the chat
            template writes are special; allow = the special tokens, for data that were written with them.
        tools: What becomes of records with tools (tool_calls, the role tool, tools): refuse = they cannot be used;
            learn = calls are learned through the chat template's own form for them, results and descriptions are not.
        seed: Of the order, the validation share and the weights' random choices.
    """

    def __init__(
        self,
        train: Sources,
        validation: float | Sources = 0.02,
        test: Sources | None = None,
        predict: Sources | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        max_length: int = 2048,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        shuffle: bool = True,
        packing: bool = False,
        subset: Subset | None = None,
        num_workers: int = 0,
        num_proc: int | None = None,
        cache_dir: str | None = None,
        invalid: Invalid = "refuse",
        special_tokens: SpecialTokens = "text",
        tools: Tools = "refuse",
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, read_template(chat_template))
        for name, value, least in (("max_length", max_length, 2), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise DataError(f"{name} is {value}, expected {least} or more")
        if isinstance(validation, float | int) and not 0 <= validation < 1:
            raise DataError(f"validation is {validation}, expected a share from 0 up to 1 (exclusive), or files")
        self.sources = {
            "train": as_sources(train),
            "validation": [] if isinstance(validation, float | int) else as_sources(validation),
            "test": as_sources(test),
            "predict": as_sources(predict),
        }
        if not self.sources["train"]:
            raise DataError("train names no file and no data set")
        self.validation_share = float(validation) if isinstance(validation, float | int) else 0.0
        self.max_length, self.batch_size = max_length, batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.shuffle, self.packing, self.seed = shuffle, packing, seed
        self.subset = Subset(**subset) if isinstance(subset, dict) else subset
        for name, given, known in (
            ("invalid", invalid, Invalid),
            ("special_tokens", special_tokens, SpecialTokens),
            ("tools", tools, Tools),
        ):
            if given not in get_args(known):
                raise DataError(f"{name} is {given!r}, expected {' or '.join(get_args(known))}")
        self.invalid: Invalid = invalid
        self.special_tokens: SpecialTokens = special_tokens
        self.tools: Tools = tools
        self.num_workers, self.num_proc, self.cache_dir = num_workers, num_proc, cache_dir
        self._train_loader: ResumableLoader | None = None
        self._position: dict[str, Any] | None = None

    # Lightning's hooks

    def train_dataloader(self) -> ResumableLoader:
        samples = self._set("train")
        chosen = self._chosen
        weights = [source.weight for source in self.sources["train"]]
        ends = samples.ends[:-1].astype(chosen.dtype)  # another type would make a copy of all
        parts = np.split(chosen, np.searchsorted(chosen, ends))
        mixed = [MixedSource(part, weight) for part, weight in zip(parts, weights, strict=True)]
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        self._train_loader = self._loader(
            samples,
            batch_size=self.batch_size,
            accumulate=accumulate,
            shuffle=self.shuffle,
            pack_to=self.max_length if self.packing else None,
            sources=mixed,
        )
        if self._position is not None:
            self._train_loader.load_state_dict(self._position)
            self._position = None
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """Where training stands in its data. Lightning keeps the state of loaders itself, but restores it too late
        when the number of steps was asked for while the optimizers were made, as every learning-rate schedule does."""
        return {} if self._train_loader is None else {"train": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        position = state_dict.get("train")
        if self._train_loader is None:
            self._position = position
        elif position is not None:  # FSDP2 restores when the loader has been made
            self._train_loader.load_state_dict(position)

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        if self.validation_share:
            return self._eval_loader("train", self._held_out)
        return self._eval_loader("validation") if self.sources["validation"] else []

    def test_dataloader(self) -> ResumableLoader | list[Any]:
        """The test samples; without data.test the validation samples, which is said."""
        if self.sources["test"]:
            return self._eval_loader("test")
        if not (self.validation_share or self.sources["validation"]):
            raise DataError("test names no file, and there are no validation samples: set data.test to files")
        rank_zero_warn("data.test names no file: the figures test/… are those of the validation samples")
        return self.val_dataloader()

    def predict_dataloader(self) -> ResumableLoader:
        """Prompts in the order of their records; labels are all IGNORE_INDEX."""
        if not self.sources["predict"]:
            raise DataError("predict names no file: set data.predict to a file of prompts")
        return self._eval_loader("predict", longest_first=False)

    def scoring_dataloader(self) -> ResumableLoader:
        """Every sample that scores should cover, exactly once over all ranks, longest first, whatever the subset."""
        return self._eval_loader("train", self._pool)

    # The parts

    def _eval_loader(self, name: str, chosen: np.ndarray | None = None, longest_first: bool = True) -> ResumableLoader:
        samples = self._set(name)
        return self._loader(
            samples,
            batch_size=self.eval_batch_size,
            shuffle=False,
            longest_first=longest_first,
            sources=[MixedSource(numbers(len(samples)) if chosen is None else chosen)],
        )

    def _loader(self, samples: SampleSet, *, pack_to: int | None = None, **plan: Any) -> ResumableLoader:
        own = replica(self.trainer)
        sampler = BatchSampler(
            samples.lengths,
            rank=own.number,
            world=own.total,
            pack_to=pack_to,
            seed=self.seed,
            **plan,
        )
        return ResumableLoader(
            samples,
            sampler,
            pad_id=self._pad_id,
            packing=pack_to is not None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
