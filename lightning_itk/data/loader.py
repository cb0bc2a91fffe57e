"""From tokenized sources to batches, and a loader that resumes in the middle of an epoch."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_itk.batch import IGNORE_INDEX, Batch, Sample, identity, pack, pad
from lightning_itk.data.columns import every, shared_arrays, shared_columns
from lightning_itk.data.order import kind
from lightning_itk.data.records import joint_fingerprint
from lightning_itk.data.sampler import BatchSampler
from lightning_itk.data.samples import TokenizedSource
from lightning_itk.position import StepPlan

_SHARED_SAMPLES = 1 << 20  # so many samples of several sources are worth files of their own


class SampleSet(Dataset[list[Sample]]):
    """The samples of several sources, one after the other. A sample's id is its record's number over all sources.

    Attributes:
        lengths: tokens [samples].
        learned: learned tokens [samples].
        response_chars: characters of the response [samples].
        sample_ids: record numbers [samples], dropped records counted.
        teacher_ids: index into `teachers` [samples].
        source_ids: number of the source [samples].
        digests: hash of the conversation [samples].
        teachers: tags in order of appearance.
        fingerprint: hash of the records of all sources in their order, whatever the tokenizer.
    """

    lengths: np.ndarray
    learned: np.ndarray
    response_chars: np.ndarray
    sample_ids: np.ndarray
    teacher_ids: np.ndarray
    source_ids: np.ndarray
    digests: np.ndarray

    def __init__(self, sources: Sequence[TokenizedSource], tags: Sequence[str | None]) -> None:
        self._sources, self._tags = list(sources), list(tags)
        teachers: dict[str, int] = {}
        numbers = []
        for source, tag in zip(sources, tags, strict=True):
            names = source.summary.teachers if tag is None else [tag] * len(source.summary.teachers)
            numbers.append(np.array([teachers.setdefault(name, len(teachers)) for name in names], np.int32))
        self.teachers = tuple(teachers) or ("",)
        self._starts = np.cumsum([0, *map(len, sources)])
        vars(self).update(_columns(self._sources, numbers))
        self.max_token_id = max(source.summary.max_token_id for source in sources)
        self.fingerprint = joint_fingerprint(source.summary.fingerprint for source in sources)

    @property
    def ends(self) -> np.ndarray:
        """The number after the last sample of each source [sources]."""
        return self._starts[1:]

    @property
    def many(self) -> bool:
        """Whether what is worked out over all samples is worth a file that all ranks of a node share."""
        return len(self) >= _SHARED_SAMPLES

    def shared_numbers(
        self, names: Sequence[str], about: Callable[[], Any], make: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Numbers of some of the samples, ascending: of many samples mapped from files beside the caches, which
        whoever comes first writes; else, and where nothing can be written, in memory.

        Args:
            names: of the arrays that `make` returns.
            about: what they depend on beside the samples, as plain JSON. Raises OSError or ValueError.
            make: works them out.
        """
        if self.many:
            with contextlib.suppress(OSError, ValueError):
                sources = [source.folder.name for source in self._sources]
                place = _place(self._sources, ["numbers", sources, list(names), about()])
                found = shared_arrays(place, make, dict.fromkeys(names, kind(len(self))))
                if all(every(partial(_ascend, len(self)), n[:-1], n[1:]) for n in found.values() if len(n)):
                    return found
        return make()

    def __reduce__(self) -> tuple[type["SampleSet"], tuple[Any, ...]]:
        return SampleSet, (self._sources, self._tags)  # spawned loader workers map the files themselves

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: np.ndarray) -> list[Sample]:
        """The samples of a row."""
        return [self._sample(int(index)) for index in row]

    def identities(self, chosen: np.ndarray) -> np.ndarray:
        """`batch.identity` of some samples [n] (S16)."""
        found = (self._sample(int(index)) for index in chosen)
        return np.array([identity(sample.input_ids, sample.labels) for sample in found], "S16")

    def _sample(self, index: int) -> Sample:
        source = int(self.source_ids[index])
        encoded = self._sources[source][index - int(self._starts[source])]
        return Sample(encoded.input_ids, encoded.labels(), int(self.sample_ids[index]), int(self.teacher_ids[index]))


def _ascend(count: int, now: np.ndarray, after: np.ndarray) -> np.ndarray:
    return (now >= 0) & (now < after) & (after < count)


def _place(sources: list[TokenizedSource], about: Any) -> Path:
    """The folder beside the caches for what follows from this."""
    name = hashlib.blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()
    return sources[0].folder.with_name(f"{name}.columns")


_COLUMNS = {
    "lengths": np.int32,
    "learned": np.int32,
    "response_chars": np.int32,
    "sample_ids": np.int64,
    "teacher_ids": np.int32,
    "source_ids": np.int32,
    "digests": np.uint64,
}


def _columns(sources: list[TokenizedSource], teachers: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The columns of the sources, one after the other: those of one as they are mapped, those of many samples in
    several mapped from files beside the caches, which all ranks of a node share, and else in memory.

    Args:
        sources: the sources.
        teachers: of each the numbers that the set has for its tags.
    """
    first = np.cumsum([0, *(source.summary.records for source in sources)]).tolist()

    def of(number: int, start: int = 0, end: int | None = None) -> dict[str, np.ndarray]:
        source, some = sources[number], slice(start, end)
        found = {name: getattr(source, name)[some] for name in ("lengths", "learned", "response_chars")}
        record, teacher, known = source.record[some], source.teacher[some], teachers[number]
        plain = np.array_equal(known, np.arange(len(known)))
        return found | {
            "sample_ids": record + first[number] if first[number] else record,
            "teacher_ids": teacher if plain else known[teacher],
            "source_ids": np.broadcast_to(np.int32(number), len(record)),
            "digests": source.digest[some],
        }

    if len(sources) == 1:
        return of(0)
    count = sum(map(len, sources))
    if count >= _SHARED_SAMPLES:
        parts = [[source.folder.name, known.tolist()] for source, known in zip(sources, teachers, strict=True)]
        blocks = [
            (number, start, start + _SHARED_SAMPLES)
            for number, source in enumerate(sources)
            for start in range(0, len(source), _SHARED_SAMPLES)
        ]
        place = _place(sources, parts)
        with contextlib.suppress(OSError, ValueError):  # where nothing can be written, memory has to do
            return shared_columns(place, count, lambda: (of(*block) for block in blocks), _COLUMNS)
    found = [of(number) for number in range(len(sources))]
    return {name: np.concatenate([columns[name] for columns in found]) for name in _COLUMNS}


def collate(rows: list[list[Sample]], *, pad_id: int, teachers: tuple[str, ...], packing: bool) -> Batch:
    """A batch of rows.

    No rows at all make the batch of a rank that has no samples in a step: two tokens that a model can run on, so that
    all ranks take part in its collectives, with nothing to learn and no sample (sample_ids and teacher_ids are -1).
    """
    if not rows:
        nothing = Sample(np.full(2, pad_id), np.full(2, IGNORE_INDEX), -1, -1)
        batch = (pack if packing else _pad_rows)([[nothing]], pad_id=pad_id, teachers=teachers)
        if not packing:
            batch["attention_mask"] = torch.ones_like(batch["attention_mask"])  # a row without any key has no softmax
        return batch
    return (pack if packing else _pad_rows)(rows, pad_id=pad_id, teachers=teachers)


def _pad_rows(rows: list[list[Sample]], *, pad_id: int, teachers: tuple[str, ...]) -> Batch:
    return pad([sample for row in rows for sample in row], pad_id=pad_id, teachers=teachers)


class ResumableLoader:
    """Batches of a `BatchSampler`, resumable at any batch.

    A restored position may come from another number of ranks, as long as the rows of an optimizer step are the same.
    Lightning saves `state_dict` with every checkpoint and restores it before the first batch. It counts the batches
    that were handed out, not those that workers have prepared. This is no torch DataLoader, so Lightning leaves its
    sampler alone; under DDP the sampler knows its rank itself.

    Args:
        samples: what to load.
        sampler: in which batches.
        pad_id: token id of padding.
        packing: lay rows out without padding.
        num_workers: worker processes that prepare batches.
        pin_memory: copy batches to page-locked memory.
    """

    def __init__(
        self,
        samples: SampleSet,
        sampler: BatchSampler,
        *,
        pad_id: int,
        packing: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.samples, self.sampler = samples, sampler
        self.batch_sampler = None  # Lightning looks, whether an evaluation loader shuffles
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self._collate = partial(collate, pad_id=pad_id, teachers=samples.teachers, packing=packing)
        self._epoch = self._batches = 0  # batches handed out in that epoch
        self._resume: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so nothing is decided before the first batch: Lightning calls iter() before it sets the epoch.
        start = self._start()
        self._epoch, self._batches = self.sampler.epoch, start
        loader = DataLoader(
            self.samples,
            batch_sampler=_From(self.sampler, start),  # type: ignore[arg-type]
            collate_fn=self._collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            # Its own generator: drawing the workers' seeds must not disturb the random numbers of the training.
            generator=torch.Generator().manual_seed(self.sampler.seed),
        )
        for batch in loader:
            batch["teachers"] = tuple(batch["teachers"])  # pinning makes a list of it
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        if self._resume is not None:
            return self._resume
        return {"epoch": self._epoch, "batches": self._batches, "plan": self.sampler.signature()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resume = state

    def _start(self) -> int:
        """The first batch of this iteration; a restored position counts once, in its own epoch."""
        state, self._resume = self._resume, None
        if state is None or state["epoch"] != self.sampler.epoch:
            return 0
        then, now = state["plan"], self.sampler.signature()
        for name in now.keys() - {"batch_size", "accumulate_grad_batches", "ranks"}:
            if then.get(name) != now[name]:
                raise ValueError(
                    f"the checkpoint stands in the middle of an epoch with {name} = {then.get(name)}, this run has "
                    f"{now[name]}: resume with the same data settings, or from a checkpoint at the end of an epoch"
                )
        return StepPlan.of(then).translate(int(state["batches"]), self.sampler.step_plan)


class _From:
    """A sampler's batches from some number on."""

    def __init__(self, sampler: BatchSampler, start: int) -> None:
        self.sampler, self.start = sampler, start

    def __len__(self) -> int:
        return len(self.sampler) - self.start

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        return self.sampler.batches(self.start)
