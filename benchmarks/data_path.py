"""From records to batches on the CPU: tokenizing, packing, loading, choosing and scoring, each beside a rival."""

import dataclasses
import gzip
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from measure import quantiles, repeated
from settings import Settings, failures_as_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from training_step import TINY, build
from transformers import PreTrainedTokenizerFast

import lightning_itk as itk
from lightning_itk.batch import count_targets, model_inputs, real_tokens
from lightning_itk.data.cache import tokenize
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.packing import best_fit
from lightning_itk.data.sources import Source, parse_chunk, read_chunks
from lightning_itk.recorder import sample_tokens
from lightning_itk.selection import sample_scores, select
from lightning_itk.toy.world import make_records

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _records(folder: Path, count: int) -> tuple[str, str]:
    """A file of records and what it is: Dolly where the real data are, made-up ones elsewhere."""
    real = Path(os.environ.get("ITK_REAL_DATA") or Path(__file__).parents[2] / "shared" / "data") / "dolly-15k.jsonl.gz"
    path = folder / "records.jsonl"
    if real.exists() and count > 200:
        with gzip.open(real, "rt") as lines:
            path.write_text("".join(itertools.islice(lines, count)))
        return str(path), "databricks-dolly-15k"
    path.write_text("\n".join(json.dumps(record) for record in make_records("general", n=count)))
    return str(path), "made up (toy world)"


def _tokenizer(path: str, vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned on the records themselves."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train([path], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class Corpus(NamedTuple):
    """Records in a file, and how they are read."""

    path: str
    data: str
    tokenizer: PreTrainedTokenizerFast
    max_length: int
    cache: str

    def module(self, **options: Any) -> itk.InstructionDataModule:
        made = {"batch_size": 8, "num_proc": 1, "max_length": self.max_length, "cache_dir": self.cache, **options}
        module = itk.InstructionDataModule(self.path, 0.0, tokenizer=self.tokenizer, **made)
        module.prepare_data()
        module.setup("fit")
        return module


class Bench:
    """Rows of one place of the data path: how many units a second, by whom."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def rate(self, what: str, key: str, unit: str, action: Callable[[], Any], wall: bool = False, **shape: Any) -> None:
        """`action` returns how many units it did, or (units, more columns). Processor time, or `wall` time."""
        seconds = time.perf_counter if wall else time.process_time
        row = {"subject": "data_path", "provider": key, "mode": what, "shape": {"what": what, **shape}}
        if self.settings.over:
            self.settings.add(**row, status="skipped", reason="time budget")
            return
        with failures_as_rows(self.settings, row):
            times, extra = [], {}
            if not self.settings.tiny:
                action()  # imports and file caches
            for _ in repeated(self.settings):
                start = seconds()
                result: Any = action()
                times.append(1e3 * (seconds() - start))
                units, extra = result if isinstance(result, tuple) else (result, {})
            found = quantiles(sorted(times))
            self.settings.add(**row, status="ok", **found, rate=1e3 * units / found["ms"], unit=f"{unit}/s", **extra)


@contextmanager
def _quiet() -> Iterator[None]:
    import logging

    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    lightning.setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        yield
    finally:
        lightning.setLevel(level)
        enable_progress_bar()


def tokenization(bench: Bench, corpus: Corpus) -> None:
    tokenizer = corpus.tokenizer
    encoder, source = ChatEncoder(tokenizer), Source(corpus.path)
    conversations = [
        r.messages for chunk in read_chunks(source) for r in parse_chunk(chunk, source, need_response=True)
    ]
    texts = [text for text, _ in encoder.render(conversations)]
    shape = {"data": corpus.data, "records": len(texts)}

    def bare() -> float:
        return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))

    def template() -> float:
        return sum(len(tokenizer.apply_chat_template(c, tokenize=True)["input_ids"]) for c in conversations)

    def whole(num_proc: int | None) -> float:
        with tempfile.TemporaryDirectory() as cache:
            made = tokenize(source, encoder, corpus.max_length, cache_dir=cache, num_proc=num_proc, progress=False)
            return float(made.summary.tokens)

    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for everybody
    bench.rate("tokenize", "tokenizer", "tokens", bare, **shape)
    bench.rate("tokenize", "template", "tokens", template, **shape)
    bench.rate("tokenize", "kit-process", "tokens", lambda: whole(1), **shape)
    bench.rate("tokenize", "kit-processes", "tokens", lambda: whole(None), True, **shape)
    os.environ.pop("TOKENIZERS_PARALLELISM")
    if threads is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = threads


def packing(bench: Bench, count: int, max_length: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 0.8, count).astype(np.int64), 8, max_length)
    shape = {"samples": count, "row": max_length}

    def filled(rows: int) -> tuple[float, dict[str, float]]:
        return count, {"fill": lengths.sum() / (rows * max_length)}

    def first_fit() -> tuple[float, dict[str, float]]:
        rooms = np.full(count, max_length)
        rows = 0
        for length in lengths:
            row = int(np.argmax(rooms[: rows + 1] >= length))
            rows = max(rows, row + 1)
            rooms[row] -= length
        return filled(rows)

    def in_order() -> tuple[float, dict[str, float]]:
        room, rows = 0, 0
        for length in lengths.tolist():
            if length > room:
                room, rows = max_length, rows + 1
            room -= length
        return filled(rows)

    offsets = np.cumsum([0, *lengths])
    ids = np.zeros(offsets[-1], np.int64)
    rows = Dataset.from_dict({"input_ids": [ids[a:b] for a, b in itertools.pairwise(offsets)]})

    def trl() -> tuple[float, dict[str, float]]:
        from trl import pack_dataset

        packed = pack_dataset(rows, max_length, strategy="bfd", map_kwargs={"batch_size": count})
        return filled(len(packed))

    bench.rate("pack", "kit-best-fit", "samples", lambda: filled(len(best_fit(lengths, max_length)[1]) - 1), **shape)
    bench.rate("pack", "trl-pack", "samples", trl, **shape)
    bench.rate("pack", "first-fit", "samples", first_fit, **shape)
    bench.rate("pack", "in-order", "samples", in_order, **shape)


def loading(bench: Bench, corpus: Corpus) -> None:
    def through(batches: Any, real: Callable[[Any], torch.Tensor]) -> tuple[float, dict[str, float]]:
        tokens = slots = 0
        for batch in batches:
            tokens += int(real(batch).sum())
            slots += batch["input_ids"].numel()
        return float(tokens), {"fill": tokens / slots}

    for packing, key in ((False, "kit-padded"), (True, "kit-packed")):
        module = corpus.module(packing=packing)
        batches = module.train_dataloader
        bench.rate("load", key, "tokens", lambda of=batches: through(of(), real_tokens), data=corpus.data)
    samples = module.train_dataloader().samples
    rows = [
        {"input_ids": sample.input_ids.tolist(), "labels": sample.labels.tolist()}
        for sample in samples[np.arange(len(samples))]
    ]

    def plain(grouped: bool) -> tuple[float, dict[str, float]]:
        from transformers import DataCollatorForSeq2Seq
        from transformers.trainer_pt_utils import LengthGroupedSampler

        collate: Any = DataCollatorForSeq2Seq(corpus.tokenizer)
        lengths = [len(row["input_ids"]) for row in rows]
        order: Any = {"sampler": LengthGroupedSampler(8, lengths=lengths)} if grouped else {"shuffle": True}
        loader = torch.utils.data.DataLoader(rows, batch_size=8, collate_fn=collate, **order)
        return through(loader, lambda batch: batch["attention_mask"])

    for key, grouped in (("loader", False), ("loader-grouped", True)):
        bench.rate("load", key, "tokens", partial(plain, grouped), data=corpus.data)


def choosing(bench: Bench, rows: int) -> None:
    rng = np.random.default_rng(0)
    losses, tokens = rng.random((2, rows), dtype=np.float32), rng.integers(1, 512, rows, dtype=np.int32)
    clusters = rng.integers(0, 300, rows, dtype=np.int32)

    def score_and_select(groups: Any) -> float:
        select(sample_scores("lp_app", losses, tokens), 0.1, clusters=groups)
        return float(rows)

    def sort_all() -> float:  # what a notebook does
        np.argsort((losses[0] - losses[1]) / losses[0])[: rows // 10]
        return float(rows)

    bench.rate("select", "kit", "rows", lambda: score_and_select(None), rows=rows)
    bench.rate("select", "kit-clusters", "rows", lambda: score_and_select(clusters), rows=rows)
    bench.rate("select", "argsort", "rows", sort_all, rows=rows)


def scoring(bench: Bench, corpus: Corpus) -> None:
    size = TINY._replace(vocab=len(corpus.tokenizer), length=corpus.max_length)
    module = itk.SFTModule(build(size, "student", Settings(device="cpu")))
    batches = list(itertools.islice(corpus.module().scoring_dataloader(), 2))
    module.eval()

    @torch.no_grad()
    def through(score: Callable[[Any], Any]) -> float:
        for batch in batches:
            score(batch)
        return sum(float(real_tokens(batch).sum()) for batch in batches)

    def bare(batch: Any) -> None:
        module.student.model(**model_inputs(batch))

    def eager(batch: Any) -> None:
        assert count_targets(batch)
        logits = module.student(**model_inputs(batch)).logits[:, :-1].float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")

    shape = {"data": corpus.data, "hidden": size.student["hidden_size"], "layers": size.student["num_hidden_layers"]}
    shape["vocab"] = size.vocab
    bench.rate("score", "forward", "tokens", lambda: through(bare), **shape)
    bench.rate("score", "kit", "tokens", lambda: through(partial(sample_tokens, module)), **shape)
    bench.rate("score", "eager-score", "tokens", lambda: through(eager), **shape)


def run(settings: Settings) -> None:
    settings = dataclasses.replace(settings, device="cpu")  # also in a run on a GPU; rows go to the same place
    bench = Bench(settings)
    count, vocab, max_length = (40, 400, 256) if settings.tiny else (1000, 8000, 1024)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path, data = _records(Path(folder), count)
        corpus = Corpus(path, data, _tokenizer(path, vocab), max_length, folder)
        tokenization(bench, corpus)
        packing(bench, 200 if settings.tiny else 20_000, 2048)
        loading(bench, corpus)
        choosing(bench, 2000 if settings.tiny else 1_000_000)
        scoring(bench, corpus)
