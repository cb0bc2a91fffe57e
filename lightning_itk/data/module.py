"""InstructionDataModule: read, check, tokenize, cache, mix, choose a subset, batch, resume."""

import contextlib
from collections.abc import Iterator
from typing import Any, get_args

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_itk.data.cache import hash_notes, tokenize, tokenize_shard
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.division import choose_shared, divide
from lightning_itk.data.loader import ResumableLoader, SampleSet
from lightning_itk.data.order import numbers
from lightning_itk.data.pieces import Shard
from lightning_itk.data.records import DataError, Invalid
from lightning_itk.data.sampler import BatchSampler, MixedSource
from lightning_itk.data.samples import TokenizedSource, report
from lightning_itk.data.sources import Source, Sources, as_sources
from lightning_itk.data.special_tokens import SpecialTokens
from lightning_itk.data.subset import Subset, say
from lightning_itk.data.template import read_template
from lightning_itk.data.tools import Tools
from lightning_itk.hub import load_tokenizer
from lightning_itk.trainer import replica


class InstructionDataModule(L.LightningDataModule):
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
        super().__init__()
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
        self._tokenizer, self._chat_template = tokenizer, read_template(chat_template)
        self._encoder: ChatEncoder | None = None
        self._sets: dict[str, SampleSet] = {}
        self._train_loader: ResumableLoader | None = None
        self._position: dict[str, Any] | None = None

    # What callbacks and modules may ask for

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with a chat template and a pad token."""
        self._prepared_encoder()
        assert isinstance(self._tokenizer, PreTrainedTokenizerBase)
        return self._tokenizer

    @property
    def encoder(self) -> ChatEncoder:
        """What turns messages into token ids, and into prompts for generation."""
        return self._prepared_encoder()

    @property
    def max_token_id(self) -> int:
        """The largest token id of the data that are set up, padding included."""
        return max([self._pad_id, *(samples.max_token_id for samples in self._sets.values())])

    @property
    def fingerprint(self) -> str:
        """A hash of the training records in their order, the same for every tokenizer."""
        return self._set("train").fingerprint

    def held_out_fingerprint(self, stage: str) -> str:
        """The same of the records that `val` or `test` looks at, or that these are taken from."""
        name = "test" if stage == "test" and self.sources["test"] else "validation"
        return self._set("train" if name == "validation" and self.validation_share else name).fingerprint

    @property
    def teachers(self) -> tuple[str, ...]:
        """Teacher tags of the training data, in order of appearance."""
        return self._set("train").teachers

    @property
    def train_sample_ids(self) -> np.ndarray:
        """Record numbers [samples] that training draws from: what `scoring_dataloader` covers, subset or not."""
        return self._set("train").sample_ids[self._pool]

    @property
    def response_tokens(self) -> np.ndarray:
        """Learned tokens [samples] of `train_sample_ids`."""
        return self._set("train").learned[self._pool]

    @property
    def response_chars(self) -> np.ndarray:
        """Characters of the responses [samples] of `train_sample_ids`."""
        return self._set("train").response_chars[self._pool]

    @property
    def token_settings(self) -> dict[str, Any]:
        """What decides which samples are drawn, and their tokens, as plain JSON."""
        names = ("max_length", "tools", "invalid", "validation_share", "seed")
        subset = None if self.subset is None else vars(self.subset)
        own = {name: getattr(self, name) for name in names} | {"records": self.fingerprint, "subset": subset}
        return own | self.encoder.fingerprints()

    def drawn(self, test: bool = False) -> list[tuple[SampleSet, np.ndarray]]:
        """The samples that training and validation, and the test if asked for, can draw: by set, their numbers."""
        more = [self._set(name) for name in ("validation", "test")[: 1 + test] if self.sources[name]]
        train = np.union1d(self._chosen, self._held_out)
        return [(self._set("train"), train), *((samples, np.arange(len(samples))) for samples in more)]

    # Lightning's hooks

    def prepare_data(self) -> None:
        """Tokenize what is not cached. Lightning calls it in one process of each machine."""
        for name, sources in self.sources.items():
            tokenized = self._tokenized(name, progress=True)
            if sources:
                samples = SampleSet(tokenized, [source.teacher for source in sources])  # files, before all ranks ask
                if name == "train" and samples.many:
                    with contextlib.suppress(DataError):  # said in setup, to runs that train
                        self._choose(samples, self._split(samples)[0])

    def prepare_shard(self, shard: Shard) -> list[tuple[str, list[int]]]:
        """Tokenize one shard's part, as `lightning-itk tokenize` does: each source and the shards that it waits for."""
        given = [found for name in self.sources for found in self._to_tokenize(name)]
        return [(args[0].name, tokenize_shard(*args, shard, **options)) for args, options in given]

    def setup(self, stage: str | None = None) -> None:
        """Open the caches. stage: fit, validate, test, predict or None for all."""
        needed = {
            "fit": ("train", "validation"),
            "validate": ("train", "validation") if self.validation_share else ("validation",),
            "test": ("test",) if self.sources["test"] else ("train", "validation"),
            "predict": ("predict",),
        }
        names = needed[stage] if stage else tuple(self.sources)
        for name in names:
            if self.sources[name]:
                self._set(name)
        if "train" in self._sets:
            self._pool, self._held_out = self._split(self._set("train"))
        if stage in ("fit", None):
            self._chosen = self._choose(self._set("train"), self._pool)
            if self.subset is not None:
                say(self.subset, len(self._chosen), len(self._pool))

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

    @property
    def _pad_id(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    def _prepared_encoder(self) -> ChatEncoder:
        if self._encoder is None:
            if self._tokenizer is None:
                self._tokenizer = _students_tokenizer(self.trainer)
            if isinstance(self._tokenizer, str):
                try:
                    self._tokenizer = load_tokenizer(self._tokenizer)
                except ValueError as error:
                    raise DataError(str(error)) from error
            self._encoder = ChatEncoder(self._tokenizer, self._chat_template, self.special_tokens)
        return self._encoder

    def _tokenized(self, name: str, *, progress: bool) -> list[TokenizedSource]:
        return [tokenize(*given, **options, progress=progress) for given, options in self._to_tokenize(name)]

    def _to_tokenize(self, name: str) -> Iterator[tuple[tuple[Source, ChatEncoder, int], dict[str, Any]]]:
        options: dict[str, Any] = {"cache_dir": self.cache_dir, "num_proc": self.num_proc, "prompts": name == "predict"}
        options |= {"invalid": self.invalid, "tools": self.tools}
        yield from (((source, self.encoder, self.max_length), options) for source in self.sources[name])

    def _set(self, name: str) -> SampleSet:
        if name not in self._sets:
            tokenized = self._tokenized(name, progress=False)
            self._sets[name] = SampleSet(tokenized, [source.teacher for source in self.sources[name]])
            report(name, [source.summary for source in tokenized], self.max_length)
            if len(self._sets) == 1:
                rank_zero_info(f"chat template: {self.encoder.template_origin}")
        return self._sets[name]

    def _split(self, samples: SampleSet) -> tuple[np.ndarray, np.ndarray]:
        return divide(samples, self.validation_share, self.seed)

    def _choose(self, samples: SampleSet, pool: np.ndarray) -> np.ndarray:
        """The samples to train on."""
        if self.subset is None:
            return pool
        return choose_shared(self.subset, samples, pool, [self.validation_share, self.seed], hash_notes(self.cache_dir))

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


def _students_tokenizer(trainer: L.Trainer | None) -> PreTrainedTokenizerBase | str:
    module = getattr(trainer, "lightning_module", None)
    found = getattr(module, "tokenizer", None) or getattr(getattr(module, "hparams", None), "student", None)
    if found is None:
        raise DataError("no tokenizer: set data.tokenizer to a folder or hub name, or train a module with a student")
    return found
