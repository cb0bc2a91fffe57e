"""A teacher's one run over the data: what it answers goes to disk, for students to learn from without it."""

import shutil
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from lightning_itk.attention.layer import LayerAttention
from lightning_itk.batch import (
    Batch,
    ResponseRows,
    Sample,
    flatten,
    is_packed,
    on_device,
    pad,
    real_tokens,
    response_rows,
    sample_spans,
)
from lightning_itk.cached.manifest import HEAD, TOKENIZER, Manifest, Mode, begin, finish, note_teacher, shard_name
from lightning_itk.cached.shards import index_hash, is_by_token, opened, read_identities, write_shard, write_tensors
from lightning_itk.losses.chunked import Head
from lightning_itk.losses.divergence import Divergence
from lightning_itk.losses.topk import TopK, TopKGap, top_k, topk_gap
from lightning_itk.methods.sharding import ShardingModule
from lightning_itk.methods.teacher import Teacher, TeacherOutput
from lightning_itk.models.hidden import check_packing, hidden_states
from lightning_itk.models.loading import weights_hash

_GAP_ROWS = 1024


class GapRows(NamedTuple):
    """Some rows of the run with the teacher's whole answer, to compare its top k with."""

    batches: list[Batch]  # on the CPU
    states: list[Tensor]  # by batch, [its response rows, H], on the CPU
    head: Head  # on the CPU

    def measure(self, student: torch.nn.Module, k: int, how: Divergence) -> TopKGap | None:
        """What the top k are worth to this student; None where the run had no rows left to keep."""
        device, found = next(student.parameters()).device, []
        for batch in self.batches:
            moved = on_device(batch, device)
            rows = response_rows(moved)
            with torch.no_grad():
                states, own_head = hidden_states(student, moved)
            found.append((states.flatten(0, 1)[rows.places], rows.targets))
        if not found:
            return None
        states, targets = (torch.cat(part) for part in zip(*found, strict=True))
        teacher, head = torch.cat(self.states).to(device), self.head.to(device)
        best = stored_precision(top_k(teacher, head, targets, k, how.temperature))
        best = best._replace(ids=best.ids.long(), log_probs=best.log_probs.float())
        return topk_gap(states, own_head, teacher, head, best, targets, how)


class TeacherRun(ShardingModule):
    """Run a teacher over a `SinglePass` with `Trainer.predict` and write what it answers to a folder, then `finish`.

    A run that was killed goes on at the shard where it stopped, and writes the same bytes as an unbroken one, on any
    number of ranks.

    Args:
        teacher: who runs.
        folder: where to write.
        mode: states = the head's input at the response rows, and the head once: the whole distribution, at any
            temperature. topk = the k likeliest tokens, and all others as one.
        k: of mode topk.
        temperature: of mode topk.
        layers: whose queries and keys are stored for the attention term, for every token; mode states only.
        tokenizer: of the data where `data.tokenizer` does not say it; None = the teacher's.
        overwrite: remove an earlier cached teacher of other settings. Nothing else is ever removed.
    """

    def __init__(
        self,
        teacher: Teacher,
        folder: str | Path,
        *,
        mode: Mode = "states",
        k: int = 128,
        temperature: float = 1.0,
        layers: Collection[int] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        if mode not in ("states", "topk"):
            raise ValueError(f"mode is {mode!r}, expected states or topk")
        if mode == "topk" and layers:
            raise ValueError("mode topk stores no queries and keys: set attention to null, or use mode states")
        vocab = teacher.model.config.get_text_config().vocab_size
        if mode == "topk" and not 1 <= k < vocab:
            raise ValueError(f"k is {k}, expected 1 to {vocab - 1}: the teacher has {vocab} tokens")
        self.teacher, self.folder, self.mode, self.layers = teacher, Path(folder).expanduser(), mode, sorted(layers)
        self.k, self.temperature, self._tokenizer, self.overwrite = k, temperature, tokenizer, overwrite
        self.complete = False
        self.gap_rows: GapRows | None = None
        self._tap = teacher.watch(self.layers) if self.layers else None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What the data are tokenized with where `data.tokenizer` does not say it."""
        found = self._tokenizer or self.teacher.load_tokenizer()
        if found is None:
            raise ValueError("no tokenizer: set data.tokenizer to a folder or hub name")
        return found

    @property
    def data(self) -> Any:
        """The `SinglePass` of this run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        super().configure_model()
        self._look()

    def _look(self) -> None:
        """Look at the folder: is it new, to be continued, or complete? Asked of one rank, so that all agree."""
        model, weights = self.teacher.model, ""
        if self.trainer.is_global_zero or any(isinstance(weight, DTensor) for weight in model.parameters()):
            weights = weights_hash(model, self.teacher.name)
        found = self._begun(weights) if self.trainer.is_global_zero else None
        wrong, complete, done = self.trainer.strategy.broadcast(found)  # type: ignore[misc]
        if wrong is not None:
            raise ValueError(wrong)
        self.complete = complete
        self.data.done = lambda piece: complete or piece in done
        self._piece = np.repeat(np.arange(len(self.data.pieces)), list(map(len, self.data.pieces)))
        self._pending: dict[int, dict[int, dict[str, Tensor]]] = defaultdict(dict)

    def _begun(self, weights: str) -> tuple[str | None, bool, set[int]]:
        settings: dict[str, Any] = {"mode": self.mode, "layers": self.layers, "precision": str(self.trainer.precision)}
        if self.mode == "topk":
            settings |= {"k": self.k, "temperature": self.temperature}
        settings |= {"weights": weights, **self.data.settings}
        try:
            complete = begin(self.folder, settings, self.overwrite)
            pieces = enumerate(self.data.pieces)
            return None, complete, {piece for piece, members in pieces if self._is_written(piece, members)}
        except ValueError as error:
            return str(error), False, set()

    def _is_written(self, piece: int, members: np.ndarray) -> bool:
        path = self.folder / shard_name(piece)
        return path.exists() and read_identities(path) == [bytes(name) for name in self._names(members)]

    def _names(self, members: np.ndarray) -> list[bytes]:
        return [name.ljust(16, b"\0") for name in self.data.identities[members].tolist()]

    def check_models(self) -> None:
        if self._tap is not None:
            self._tap.probe(self.layers)

    def models(self) -> Iterable[torch.nn.Module]:
        """What FSDP2 shards."""
        yield self.teacher.model

    def on_predict_start(self) -> None:
        super().on_predict_start()
        if self.data.data.packing:
            check_packing(self.teacher.model)
        probe = on_device(pad([Sample(np.arange(1, 5), np.arange(1, 5), 0)], pad_id=0), self.device)
        with self.trainer.precision_plugin.forward_context():
            answer = self.teacher(probe)
        head = _whole(answer.head)
        columns = self._columns(answer, head, response_rows(probe))
        wrong = None
        if self.trainer.is_global_zero:
            try:
                self._announce(columns, head)
                facts = self._facts(answer, head)
                (self.teacher.load_tokenizer() or self.data.data.tokenizer).save_pretrained(self.folder / TOKENIZER)
                if self.mode == "states":
                    tensors = {"weight": head.weight, "bias": head.bias}
                    write_tensors(self.folder / HEAD, {name: t for name, t in tensors.items() if t is not None})
                else:
                    bias = None if head.bias is None else head.bias.cpu()
                    self.gap_rows = GapRows([], [], head._replace(weight=head.weight.detach().cpu(), bias=bias))
                note_teacher(self.folder, facts)
            except (ValueError, OSError) as error:
                wrong = str(error)
        wrong = self.trainer.strategy.broadcast(wrong)
        if wrong is not None:
            raise ValueError(wrong)

    def _facts(self, answer: TeacherOutput, head: Head) -> dict[str, Any]:
        attention = {str(layer): _layer_facts(seen) for layer, seen in sorted(answer.attention.items())}
        return {
            "name": self.teacher.name,
            "dtype": str(answer.states.dtype).removeprefix("torch."),
            "layers": self.teacher.num_layers,
            "vocab": head.weight.shape[0],
            "head": {"scale": head.scale, "softcap": head.softcap},
            "attention": attention,
        }

    def _announce(self, columns: dict[str, Tensor], head: Head) -> None:
        """Say what will be written, and refuse what the disk has no room for."""
        by_token = {name for name in columns if is_by_token(name)}
        size = {name: tensor[0].numel() * tensor.element_size() for name, tensor in columns.items()}
        row = sum(size[name] for name in columns.keys() - by_token)
        token = sum(size[name] for name in by_token)
        rows, tokens = self.data.response_tokens, int(self.data.lengths.sum())
        once = head.weight.numel() * head.weight.element_size() if self.mode == "states" else 0
        total = row * rows + token * tokens + once + 64 * len(self.data.lengths)
        there = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        free = shutil.disk_usage(self.folder).free
        text = f"{self.folder}: {_bytes(total)} for {len(self.data.lengths):,} samples: {row:,} bytes for each of "
        text += f"{rows:,} response tokens"
        text += f", {token:,} for each of {tokens:,} tokens (attention)" if token else ""
        text += f", {_bytes(once)} once (head)" if once else ""
        rank_zero_info(text + (f"; {_bytes(there)} of it are there" if there else "") + f"; {_bytes(free)} are free")
        if total - there > free:
            raise ValueError(f"{self.folder}: needs {_bytes(total - there)}, but {_bytes(free)} are free on its disk")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[int]:
        """Run the teacher, and write the shards that this completes. Returns their numbers."""
        if is_packed(batch) and "flash" in (self.teacher.model.config._attn_implementation or ""):
            batch = flatten(batch)
        rows = response_rows(batch)
        answer = self.teacher(batch)
        head = _whole(answer.head) if self.mode == "topk" else answer.head
        found = self._columns(answer, head, rows)
        host, spans = rows.host, sample_spans(rows.host)
        numbers = [int(host["sample_ids"][real_tokens(host)][span.start]) for span in spans]
        owner = host["sample_ids"].flatten()[rows.places.cpu()]
        counts = [int((owner == number).sum()) for number in numbers]
        widths = [span.stop - span.start for span in spans]
        parts = {name: t.cpu().split(widths if is_by_token(name) else counts) for name, t in found.items()}
        if self.gap_rows is not None and sum(map(len, self.gap_rows.states)) < _GAP_ROWS and len(owner):
            self.gap_rows.batches.append(host)
            self.gap_rows.states.append(answer.states.flatten(0, 1)[rows.places].cpu())
        complete = []
        for place, number in enumerate(numbers):
            piece = int(self._piece[number])
            self._pending[piece][number] = {name: part[place] for name, part in parts.items()}
            if len(self._pending[piece]) == len(self.data.pieces[piece]):
                self._write(piece)
                complete.append(piece)
        return complete

    def on_predict_end(self) -> None:
        self.trainer.strategy.barrier()  # the last shard of the slowest rank

    def _columns(self, answer: TeacherOutput, head: Head, rows: ResponseRows) -> dict[str, Tensor]:
        """What is stored of an answer: by response row, or by real token (attention)."""
        states = answer.states.flatten(0, 1)[rows.places]
        columns: dict[str, Tensor] = {}
        if self.mode == "topk":
            best = stored_precision(top_k(states, head, rows.targets, self.k, self.temperature))
            columns |= {"ids": best.ids, "log_probs": best.log_probs, "nll": best.nll}
        else:
            columns["states"] = states
        if answer.attention:
            real = real_tokens(rows.host).flatten().nonzero().flatten().to(states.device)
        for layer, seen in sorted(answer.attention.items()):
            columns[f"q.{layer}"] = seen.q.transpose(1, 2).flatten(0, 1)[real]
            columns[f"k.{layer}"] = seen.k.transpose(1, 2).flatten(0, 1)[real]
        return columns

    def _write(self, piece: int) -> None:
        members, found = self.data.pieces[piece], self._pending.pop(piece)
        columns = {name: [found[number][name] for number in members] for name in found[members[0]]}
        tokens = self.data.lengths[members].tolist()
        write_shard(self.folder, piece, self._names(members), columns, tokens)

    def finish(self) -> Manifest:
        """Write the manifest, once every shard is there: after `Trainer.predict`, on the first rank only."""
        if self.complete:
            return Manifest.read(self.folder)
        for piece, members in enumerate(self.data.pieces):
            if not self._is_written(piece, members):
                raise ValueError(f"{self.folder / shard_name(piece)}: is not there or not of this run: run it again")
        index = index_hash(opened(self.folder / shard_name(piece)) for piece in range(len(self.data.pieces)))
        return finish(self.folder, len(self.data.pieces), len(self.data.lengths), self.data.response_tokens, index)


def stored_precision(best: TopK) -> TopK:
    """Top-k answers as they are stored: ids in 2 bytes where that is enough, log-probabilities in 2."""
    ids = best.ids.to(torch.uint16 if best.vocab <= 1 << 16 else torch.int32)
    return best._replace(ids=ids, log_probs=best.log_probs.clamp_min(-60000.0).half(), nll=best.nll.float())


def _layer_facts(seen: LayerAttention) -> dict[str, Any]:
    shape = {"heads": seen.q.shape[1], "head_dim": seen.q.shape[3]}
    return shape | {name: getattr(seen, name) for name in ("scaling", "window", "softcap", "causal")}


def _whole(head: Head) -> Head:
    """A head whose tensors are no shards; called on all ranks."""
    weight, bias = head.weight, head.bias
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    if isinstance(bias, DTensor):
        bias = bias.full_tensor()
    return head._replace(weight=weight, bias=bias)


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
