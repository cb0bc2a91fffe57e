"""The samples of a data module: tokenized, opened, divided and chosen from, and what may be asked of them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lightning_itk.data.cache import hash_notes, tokenize, tokenize_shard
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.division import choose_shared, divide
from lightning_itk.data.loader import SampleSet
from lightning_itk.data.pieces import Shard
from lightning_itk.data.records import DataError, Invalid
from lightning_itk.data.samples import TokenizedSource, report
from lightning_itk.data.sources import Source
from lightning_itk.data.special_tokens import SpecialTokens
from lightning_itk.data.subset import Subset, say
from lightning_itk.data.tools import Tools
from lightning_itk.hub import load_tokenizer


class PreparedData(L.LightningDataModule):
    """A data module up to its loaders. `InstructionDataModule` says what the settings mean."""

    sources: dict[str, list[Source]]  # of train, validation, test, predict
    validation_share: float
    max_length: int
    seed: int
    subset: Subset | None
    invalid: Invalid
    special_tokens: SpecialTokens
    tools: Tools
    num_proc: int | None
    cache_dir: str | None

    def __init__(self, tokenizer: str | PreTrainedTokenizerBase | None, chat_template: str | None) -> None:
        super().__init__()
        self._tokenizer, self._chat_template = tokenizer, chat_template
        self._encoder: ChatEncoder | None = None
        self._sets: dict[str, SampleSet] = {}

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


def _students_tokenizer(trainer: L.Trainer | None) -> PreTrainedTokenizerBase | str:
    module = getattr(trainer, "lightning_module", None)
    found = getattr(module, "tokenizer", None) or getattr(getattr(module, "hparams", None), "student", None)
    if found is None:
        raise DataError("no tokenizer: set data.tokenizer to a folder or hub name, or train a module with a student")
    return found
