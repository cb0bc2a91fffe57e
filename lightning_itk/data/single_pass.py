"""One pass over every sample that a run can draw, in pieces that do not depend on the number of ranks."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import numpy as np

from lightning_itk.batch import Batch, Sample
from lightning_itk.data.loader import collate
from lightning_itk.data.module import InstructionDataModule
from lightning_itk.data.packing import best_fit
from lightning_itk.data.records import DataError
from lightning_itk.trainer import replica

PIECE_TOKENS = 1 << 15


class SinglePass(L.LightningDataModule):
    """Every sample of another data module once, whatever its shuffling, repeats and number of ranks.

    The samples are cut into pieces of about as many tokens, and a piece into batches of the data module's own size and
    layout; both depend on the data only. A rank takes whole pieces. In a batch, `sample_ids` are the numbers of this
    pass; samples with the same tokens come once.

    Args:
        data: whose samples: those of training, validation and test.
        wanted: which teacher tags take part; None = all.
        piece_tokens: tokens of a piece.
    """

    def __init__(
        self,
        data: InstructionDataModule,
        wanted: Callable[[str], bool] | None = None,
        piece_tokens: int = PIECE_TOKENS,
    ) -> None:
        super().__init__()
        self.data, self.wanted, self.piece_tokens = data, wanted, piece_tokens
        self.done: Callable[[int], bool] = lambda piece: False  # which pieces are left out; the same on every rank

    def prepare_data(self) -> None:
        self.data.trainer = self.trainer
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        self.data.trainer = self.trainer
        self.data.setup("fit")
        self._sets = self.data.drawn(test=True)
        found = [self._wanted(number) for number in range(len(self._sets))]
        places, names = (np.concatenate(part) for part in zip(*found, strict=True))
        _, first = np.unique(names, return_index=True)
        first.sort()
        self._places, self.identities = places[first], names[first]
        if not len(first):
            raise DataError("no sample of the data is this teacher's")
        lengths = np.array([self._sets[number][0].lengths[index] for number, index in self._places])
        if not self.data.packing:  # longest first: little padding, and memory runs out at once or never
            order = np.argsort(-lengths, kind="stable")
            self._places, self.identities, lengths = self._places[order], self.identities[order], lengths[order]
        self.lengths = lengths
        piece = (np.cumsum(lengths) - lengths) // self.piece_tokens
        self.pieces = np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(piece)) + 1)

    def _wanted(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Set and number [n, 2] of the samples that take part, and their identities [n]."""
        samples, chosen = self._sets[number]
        if self.wanted is not None:
            tags = np.array([self.wanted(tag) for tag in samples.teachers])
            chosen = chosen[tags[samples.teacher_ids[chosen]]]
        return np.stack([np.full(len(chosen), number), chosen], 1), samples.identities(chosen)

    @property
    def settings(self) -> dict[str, Any]:
        """What the batches depend on, as plain JSON."""
        samples = hashlib.blake2b(self.identities.tobytes(), digest_size=16).hexdigest()
        layout = {"batch_size": self.data.batch_size, "packing": self.data.packing, "piece_tokens": self.piece_tokens}
        return {"data": self.data.token_settings, "batches": layout, "samples": samples}

    @property
    def response_tokens(self) -> int:
        """Of all samples."""
        samples = (self._sets[number][0].learned[index] for number, index in self._places)
        return int(sum(samples))

    def batches(self, piece: int) -> list[list[np.ndarray]]:
        """The batches of a piece as lists of rows (arrays of numbers of this pass)."""
        members, size = self.pieces[piece], self.data.batch_size
        bounds = np.arange(len(members) + 1)
        if self.data.packing:
            order, bounds = best_fit(self.lengths[members], self.data.max_length)
            members = members[order]
        rows = np.split(members, bounds[1:-1])
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def predict_dataloader(self) -> "PieceLoader":
        own = replica(self.trainer)
        left = [piece for piece in range(len(self.pieces)) if not self.done(piece)]
        shares = [[b for piece in left[rank :: own.total] for b in self.batches(piece)] for rank in range(own.total)]
        longest = max(map(len, shares))  # sharded models run on all ranks at once
        share = shares[own.number]
        pad_id = self.data.tokenizer.pad_token_id or 0
        return PieceLoader(
            [*share, *([[]] * (longest - len(share)))], self._row, pad_id=pad_id, packing=self.data.packing
        )

    def _row(self, row: np.ndarray) -> list[Sample]:
        found = []
        for number in row:
            of_set, index = self._places[number]
            (sample,) = self._sets[of_set][0][np.array([index])]
            found.append(sample._replace(sample_id=int(number), teacher_id=0))
        return found


class PieceLoader:
    """Batches made when they are asked for. No torch DataLoader, so Lightning leaves its order alone."""

    def __init__(
        self, batches: list[list[np.ndarray]], row: Callable[[np.ndarray], list[Sample]], **layout: Any
    ) -> None:
        self._batches, self._row = batches, row
        self._collate: Callable[..., Batch] = partial(collate, teachers=("",), **layout)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._batches:
            yield self._collate([self._row(row) for row in rows])
