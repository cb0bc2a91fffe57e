"""The contract between data and modules: what a batch holds, and the one label shift.

This is the only file that knows the keys of a `Batch`. Shapes: B rows, S positions, N samples.

Padded and packed batches differ only in their layout: a padded row holds one sample, a packed row holds several, one
after the other, with `position_ids` that restart at 0. Everything a loss needs (which sample a token belongs to, which
teacher it goes to, what it must predict) is written per token, so a loss cannot tell the two apart.
"""

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORE_INDEX = -100
"""The label that no loss looks at (the Hugging Face convention)."""


class Sample(NamedTuple):
    """One tokenized record."""

    input_ids: np.ndarray  # [tokens]
    labels: np.ndarray  # [tokens], unshifted, IGNORE_INDEX where nothing is learned
    sample_id: int  # the record's number in its data set
    teacher_id: int = 0  # index into Batch["teachers"]


class Batch(TypedDict):
    """Tensors of one micro-batch. Padding has sample_ids == teacher_ids == -1 and labels == IGNORE_INDEX."""

    input_ids: Int[Tensor, "B S"]
    labels: Int[Tensor, "B S"]  # unshifted: labels[t] is input_ids[t] or IGNORE_INDEX
    position_ids: Int[Tensor, "B S"]  # 0, 1, 2, … within each sample
    sample_ids: Int[Tensor, "B S"]
    teacher_ids: Int[Tensor, "B S"]
    teachers: tuple[str, ...]  # teacher tags of the data; "" is the tag of untagged records
    attention_mask: NotRequired[Bool[Tensor, "B S"]]  # padded batches only, False at the end of rows; absent = packed
    host_copy: NotRequired["HostCopy"]  # on a device: the batch that it was sent as


def pad(samples: Sequence[Sample], *, pad_id: int, teachers: tuple[str, ...] = ("",), multiple: int = 1) -> Batch:
    """Lay samples out one per row, padded on the right to the longest (rounded up to `multiple`)."""
    batch = pack([[sample] for sample in samples], pad_id=pad_id, teachers=teachers, multiple=multiple)
    batch["attention_mask"] = batch["sample_ids"] >= 0
    return batch


def pack(
    rows: Sequence[Sequence[Sample]], *, pad_id: int, teachers: tuple[str, ...] = ("",), multiple: int = 1
) -> Batch:
    """Lay samples out several per row, one after the other; only a row's unused tail is padded.

    The tail is a segment of its own (its positions restart at 0), so no real token attends to it.
    """
    if not rows or not all(rows):
        raise ValueError("a batch needs at least one sample in every row")
    widest = max(sum(len(sample.input_ids) for sample in row) for row in rows)
    width = -(-widest // multiple) * multiple
    shape = (len(rows), width)
    input_ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
    positions, sample_ids, teacher_ids = np.zeros(shape, np.int64), np.full(shape, -1), np.full(shape, -1)
    for r, row in enumerate(rows):
        start = 0
        for sample in row:
            span = slice(start, start := start + len(sample.input_ids))
            input_ids[r, span], labels[r, span] = sample.input_ids, sample.labels
            positions[r, span] = np.arange(span.stop - span.start)
            sample_ids[r, span], teacher_ids[r, span] = sample.sample_id, sample.teacher_id
        positions[r, start:] = np.arange(width - start)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions),
        sample_ids=torch.from_numpy(sample_ids),
        teacher_ids=torch.from_numpy(teacher_ids),
        teachers=teachers,
    )


def is_packed(batch: Batch) -> bool:
    return "attention_mask" not in batch


def real_tokens(batch: Batch) -> Bool[Tensor, "B S"]:
    """True where there is a token of a sample, False on padding."""
    return batch["sample_ids"] >= 0


def next_token_labels(batch: Batch) -> Int[Tensor, "B S"]:
    """Labels aligned with the position that predicts them: position t holds the label of token t + 1.

    The last token of a sample predicts nothing, also where another sample follows it in the row. This is the kit's one
    shift; every loss, the attention rows included, uses these labels.
    """
    labels, sample_ids = batch["labels"], batch["sample_ids"]
    shifted = torch.full_like(labels, IGNORE_INDEX)
    same_sample = sample_ids[:, 1:] == sample_ids[:, :-1]
    shifted[:, :-1] = torch.where(same_sample, labels[:, 1:], IGNORE_INDEX)
    return shifted


class HostCopy:
    """A batch of the CPU that was sent to a device, to look at as long as what arrived there is unchanged."""

    def __init__(self, sent: Batch, arrived: Batch) -> None:
        self._sent = sent
        self._versions = {key: (tensor, tensor._version) for key, tensor in _tensors(arrived).items()}

    def of(self, batch: Batch) -> Batch | None:
        """The copy; None where a tensor of the batch was replaced, added, taken out or written to."""
        now, then = _tensors(batch), self._versions
        same = now.keys() == then.keys() and all(now[key] is t and t._version == at for key, (t, at) in then.items())
        return self._sent if same else None


def keep_host_copy(arrived: Batch, sent: Batch) -> Batch:
    """A batch that arrived on a device, with the CPU's copy beside it where there is one that can be trusted."""
    tensors = [*_tensors(arrived).values()]
    if sent["input_ids"].device.type != "cpu" or any(t.device.type == "cpu" or t.is_inference() for t in tensors):
        return arrived  # tensors of an inference do not tell whether they were written to
    return Batch(**{**arrived, "host_copy": HostCopy(sent, arrived)})  # type: ignore[typeddict-item]


def on_host(batch: Batch) -> Batch:
    """The batch on the CPU, where looking at its numbers waits for nothing. Waits for a GPU once, unless the copy that
    was sent there is at hand."""
    if batch["input_ids"].device.type == "cpu":
        return batch
    if "host_copy" in batch and (copy := batch["host_copy"].of(batch)) is not None:
        return copy
    tensors = _tensors(batch)
    copies = torch.stack([tensor.long() for tensor in tensors.values()]).cpu().unbind()
    found = {key: copy.to(tensor.dtype) for (key, tensor), copy in zip(tensors.items(), copies, strict=True)}
    return Batch(**{**batch, **found})  # type: ignore[typeddict-item]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch of the CPU on its way to a device, without waiting for it."""
    moved = {key: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for key, v in batch.items()}
    return keep_host_copy(Batch(**moved), batch)  # type: ignore[typeddict-item]


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if isinstance(value, Tensor)}


class ResponseRows(NamedTuple):
    """Where a batch predicts tokens that are learned."""

    places: Int[Tensor, " N"]  # among the flattened [B * S] positions
    targets: Int[Tensor, " N"]  # the token that each of them predicts; never IGNORE_INDEX
    host: Batch  # the batch on the CPU: what else must be known of it is asked there


def response_rows(batch: Batch) -> ResponseRows:
    """What every loss looks at. Finding it waits for the GPU where `on_host` does, so ask once per batch.

    Raises:
        ValueError: padding that is not on the right.
    """
    device, host = batch["input_ids"].device, on_host(batch)
    if not is_packed(host) and (mask := host["attention_mask"].bool()).diff(dim=1).logical_and(mask[:, 1:]).any():
        raise ValueError("a padded batch must have its padding on the right, found a token after padding")
    labels = next_token_labels(host).flatten()
    places = (labels != IGNORE_INDEX).nonzero().flatten()
    places, targets = (tensor.to(device, non_blocking=True) for tensor in (places, labels[places]))
    return ResponseRows(places, targets, host)


def identity(input_ids: np.ndarray, labels: np.ndarray) -> bytes:
    """What a sample is, wherever it stands: 16 bytes made of its tokens [tokens] and of which are learned.

    A model's answers at its response rows depend on nothing else.
    """
    content = hashlib.blake2b(np.ascontiguousarray(input_ids, np.int64).tobytes(), digest_size=16)
    content.update(np.packbits(np.asarray(labels)[1:] != IGNORE_INDEX).tobytes())  # nothing predicts the first
    return content.digest()


def sample_spans(batch: Batch) -> list[slice]:
    """Where each sample of a batch stands among its flattened real tokens, in order of appearance. Ask on the CPU."""
    positions = batch["position_ids"][real_tokens(batch)]
    starts = (positions == 0).nonzero().flatten().tolist()
    return [slice(start, end) for start, end in pairwise([*starts, len(positions)])]


def identities(batch: Batch) -> np.ndarray:
    """`identity` of every sample of a batch on the CPU [samples] (S16), in order of appearance."""
    real = real_tokens(batch)
    ids, labels = (batch[key][real].numpy() for key in ("input_ids", "labels"))  # type: ignore[literal-required]
    return np.array([identity(ids[span], labels[span]) for span in sample_spans(batch)], "S16")


def count_targets(batch: Batch) -> Int[Tensor, ""]:
    """How many predictions the losses of this batch sum over. A tensor, so that counting never waits for the GPU."""
    return (next_token_labels(batch) != IGNORE_INDEX).sum()


def sample_shares(batch: Batch) -> Float[Tensor, "B S"]:
    """How much each token counts where all tokens of a sample count alike, and a sample as much as its response tokens.

    They add up to `count_targets`, padding has none of them, and no layout changes them. Ask on the CPU.
    """
    segments = (batch["position_ids"] == 0).flatten().cumsum(0) - 1
    learned = (next_token_labels(batch) != IGNORE_INDEX).flatten()
    shares = segments.bincount(learned.double()) / segments.bincount()
    return shares[segments].view_as(batch["labels"]).float()


def cu_seqlens(batch: Batch) -> Int[Tensor, "segments+1"]:
    """Segment boundaries over the flattened [B * S] tokens: every sample, and every padded tail, is one segment."""
    starts = (batch["position_ids"] == 0).flatten().nonzero().flatten()
    return torch.nn.functional.pad(starts, (0, 1), value=batch["position_ids"].numel()).to(torch.int32)


def _take(batch: Batch, index: Int[Tensor, "B S"]) -> Batch:
    """A batch of the flattened tokens named by `index`; -1 makes padding."""
    hole = index < 0
    where = index.clamp_min(0)

    def gather(key: str, fill: int) -> Tensor:
        return batch[key].flatten()[where].masked_fill(hole, fill)  # type: ignore[literal-required]

    # Padding that follows a sample starts a segment of its own.
    tail = torch.cumsum(hole.long(), dim=1) - 1
    taken = Batch(
        input_ids=gather("input_ids", 0),
        labels=gather("labels", IGNORE_INDEX),
        position_ids=torch.where(hole, tail, gather("position_ids", 0)),
        sample_ids=gather("sample_ids", -1),
        teacher_ids=gather("teacher_ids", -1),
        teachers=batch["teachers"],
    )
    if not is_packed(batch):
        taken["attention_mask"] = ~hole
    return taken


def select(batch: Batch, keep: Bool[Tensor, "B S"]) -> tuple[Batch, Int[Tensor, "b s"]] | None:
    """The tokens of whole samples, in the batch's own layout, without the rows and the columns that this empties.

    Args:
        keep: True on every token of the samples to keep.

    Returns:
        The smaller batch, and for each of its positions the flattened [B * S] index it came from (-1 on padding);
        None when nothing is kept.
    """
    keep = keep & real_tokens(batch)
    lengths = keep.sum(1)
    rows = lengths.nonzero().flatten()
    if rows.numel() == 0:
        return None
    width = int(lengths.max())
    # A stable sort moves the kept tokens of a row to its front and keeps their order.
    order = torch.sort((~keep[rows]).long(), dim=1, stable=True).indices[:, :width]
    index = rows[:, None] * keep.shape[1] + order
    index = index.masked_fill(torch.arange(width, device=keep.device) >= lengths[rows, None], -1)
    return _take(batch, index), index


def unpack(batch: Batch) -> Batch:
    """One sample per row, padded on the right: the padded twin of a packed batch, in order of appearance."""
    starts = ((batch["position_ids"] == 0) & real_tokens(batch)).flatten().nonzero().flatten()
    ends = cu_seqlens(batch).long()
    ends = ends[torch.searchsorted(ends, starts, right=True)]
    lengths = ends - starts
    offsets = torch.arange(int(lengths.max()), device=starts.device)
    index = (starts[:, None] + offsets).masked_fill(offsets >= lengths[:, None], -1)
    if not is_packed(batch):
        index = index.masked_fill(~real_tokens(batch).flatten()[index.clamp_min(0)], -1)
    unpacked = _take(batch, index)
    unpacked["attention_mask"] = index >= 0
    return unpacked


def flatten(batch: Batch) -> Batch:
    """All samples in a single row without any padding: what the flash kernels want from a packed batch."""
    index = real_tokens(batch).flatten().nonzero().flatten()[None]
    flat = _take(batch, index)
    flat.pop("attention_mask", None)
    return flat


def left_padded(batch: Batch) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]]:
    """Token ids and mask of a padded batch of prompts with the padding on the left, as `generate` wants it."""
    keep = real_tokens(batch)
    order = torch.sort(keep.long(), dim=1, stable=True).indices
    return batch["input_ids"].gather(1, order), keep.gather(1, order).long()


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """Keyword arguments for a Hugging Face causal LM.

    A packed batch carries no mask: transformers reads the segments off the restarting positions.
    """
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    if not is_packed(batch):
        inputs["attention_mask"] = batch["attention_mask"]
    return inputs
