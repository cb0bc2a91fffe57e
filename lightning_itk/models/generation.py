"""A model's responses to prompts: in batches, resumable, as records that can be trained on.

While it runs, complete lines are appended to `NAME.partial`, whose first line holds the settings. A run that was killed
continues there, with the same batches and the same random numbers; the file itself appears, in the order of the
prompts, when all are answered.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.records import (
    CONVERSATIONS,
    PROMPTS,
    RESPONSES,
    DataError,
    Fingerprint,
    Message,
    Record,
    check,
    parse_line,
)
from lightning_itk.data.sources import Source, parse_chunk, read_chunks
from lightning_itk.files import replacing


class Prompt(NamedTuple):
    """A prompt and the record that it came from."""

    record: Record  # its messages, without the response
    original: dict[str, Any]


class Response(NamedTuple):
    """What a model answered."""

    text: str
    finished: bool  # the model ended it itself, before max_new_tokens


def read_prompts(source: Source, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of a source (None = all); responses in it are ignored.

    Raises:
        DataError: as for training, but a response may be missing.
    """
    prompts: list[Prompt] = []
    for chunk in read_chunks(source):
        records = parse_chunk(chunk, source, need_response=False)
        originals = (parse_line(raw) if isinstance(raw, bytes) else raw for raw in chunk.raw)
        prompts += map(Prompt, records, originals)
        if limit is not None and len(prompts) >= limit:
            break
    return prompts[:limit]


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of prompts in their order."""
    fingerprint = Fingerprint()
    fingerprint.add(b"".join(prompt.record.digest() for prompt in prompts))
    return str(fingerprint)


class Generator:
    """Answers prompts with a model.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer; gets a chat template if it has none.
        max_new_tokens: longest response.
        temperature: 0 = the likeliest token each time; otherwise tokens are drawn from the whole distribution.
        seed: of drawing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        if max_new_tokens < 1 or temperature < 0 or seed < 0:
            raise ValueError(
                "max_new_tokens must be at least 1, temperature and seed not negative, "
                f"found {max_new_tokens}, {temperature} and {seed}"
            )
        self.model, self.tokenizer, self.encoder = model.eval(), tokenizer, ChatEncoder(tokenizer)
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.stops = stop_tokens(model, tokenizer, self.encoder)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        self._config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            eos_token_id=self.stops,
            pad_token_id=self.pad_id,
            **drawn,
        )

    def prompt_ids(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """Token ids of prompts through the chat template.

        Raises:
            DataError: a prompt that leaves the model no room for an answer.
        """
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        found = []
        for prompt in prompts:
            try:
                ids = self.encoder.prompt_ids(prompt.record.messages)
            except ValueError as error:
                raise DataError(f"{prompt.record.place}: {error}") from None
            if room is not None and len(ids) + self.max_new_tokens > room:
                raise DataError(
                    f"{prompt.record.place}: {len(ids)} prompt tokens and {self.max_new_tokens} new ones are more "
                    f"than the {room} positions of the model"
                )
            found.append(ids)
        return found

    @torch.no_grad()
    def answer(self, prompts: Sequence[np.ndarray], number: int = 0) -> list[Response]:
        """Answer one batch.

        Args:
            prompts: token ids, one array each.
            number: of the batch; the random numbers depend on it and the seed only.
        """
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, width - len(prompt) :] = 1
        device = self.model.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed((self.seed << 32) + number)
            output = self.model.generate(  # type: ignore[operator]
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=self._config
            )
        return [self._response(row) for row in output[:, width:].tolist()]

    def _response(self, tokens: list[int]) -> Response:
        end = next((i for i, token in enumerate(tokens) if token in self.stops), len(tokens))
        text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        assert isinstance(text, str)
        # A lone half of a character at the cut is no text; what the tokenizer makes of it stays.
        return Response(text.strip(), end < len(tokens))


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoder: ChatEncoder) -> list[int]:
    """What ends an answer: the model's and the tokenizer's EOS, and the stop token of the chat template."""
    known = getattr(model.generation_config, "eos_token_id", None)
    found = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id}
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    try:
        ids, spans = encoder.encode([[question, answer]])[0]
    except ValueError:
        return sorted(found - {None})  # a template with demands of its own
    last = int(ids[spans[-1, 1] - 1])
    if last in tokenizer.added_tokens_decoder:
        found.add(last)
    return sorted(found - {None})


def answered(prompt: Prompt, columns: Mapping[str, str], response: Response, teacher: str) -> dict[str, Any]:
    """A record that holds a prompt as it came and a response to it, in a form that needs no column map."""
    left_out = {*RESPONSES, *CONVERSATIONS, "teacher", "is_domain", *columns.values()}
    fields = {name: value for name, value in prompt.original.items() if name not in left_out}
    fields |= {
        name: prompt.original[column]
        for name, column in columns.items()
        if name not in left_out and column in prompt.original
    }
    more = {"teacher": teacher, "finished": response.finished, "record": prompt.record.number}
    try:  # instruction with response, where that says it all
        if check({**fields, "response": "a"}, {})[0][:-1] == prompt.record.messages:
            return {**fields, "response": response.text, **more}
    except DataError:
        pass
    messages: list[Message] = [*prompt.record.messages, {"role": "assistant", "content": response.text}]
    kept = {name: value for name, value in fields.items() if name not in (*PROMPTS, "system", "input", "context")}
    return {**kept, "messages": messages, **more}


def generate(
    generator: Generator,
    source: Source,
    prompts: Sequence[Prompt],
    output: str | Path,
    settings: Mapping[str, Any],
    *,
    teacher: str,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Answer all prompts and write the records; continue where a killed run of the same settings stopped.

    Args:
        generator: who answers.
        source: where the prompts come from, for its column map.
        prompts: the prompts.
        output: JSON Lines file to write, in the order of the prompts; it must not exist.
        settings: everything that the responses depend on, as plain JSON.
        teacher: the tag of the records.
        batch_size: prompts at once, of similar length; it belongs to the settings.
        progress: told how many prompts are answered.

    Returns:
        The records.

    Raises:
        ValueError: the output exists, cannot be written, or was begun with other settings; a prompt is too long.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output}: exists already, remove it or name another file")
    ids = generator.prompt_ids(prompts)
    partial = output.with_name(output.name + ".partial")
    with _partial(partial, dict(settings)) as (file, records):
        progress(len(records))
        # The longest first: what does not fit into memory shows at once.
        order = np.argsort([-len(prompt) for prompt in ids], kind="stable")
        for number, start in enumerate(range(0, len(order), batch_size)):
            batch = order[start : start + batch_size]
            if all(int(index) in records for index in batch):
                continue
            responses = generator.answer([ids[index] for index in batch], number)
            for index, response in zip(map(int, batch), responses, strict=True):
                if index not in records:
                    records[index] = answered(prompts[index], source.columns or {}, response, teacher)
                    line = json.dumps({"prompt": index, "answer": records[index]}, ensure_ascii=False)
                    file.write(line.encode() + b"\n")
            file.flush()
            progress(len(records))
    done = [records[index] for index in range(len(prompts))]
    with replacing(output) as whole:
        for record in done:
            whole.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    partial.unlink()
    return done


@contextmanager
def _partial(path: Path, settings: dict[str, Any]) -> Iterator[tuple[Any, dict[int, dict[str, Any]]]]:
    """The file of an unfinished run, open to append to, and what it holds. A half-written last line is cut off."""
    header = json.dumps(settings, ensure_ascii=False).encode() + b"\n"
    records: dict[int, dict[str, Any]] = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            first = file.readline()
            if first.endswith(b"\n"):
                _check_settings(path, first, settings)
                end = file.tell()
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    entry = parse_line(line)
                    records[entry["prompt"]] = entry["answer"]
                    end += len(line)
                file.truncate(end)
            else:
                file.truncate(0)
                file.write(header)
            yield file, records
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror or error}") from error


def _check_settings(path: Path, header: bytes, settings: dict[str, Any]) -> None:
    try:
        before = parse_line(header)
        changed = [name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name)]
    except (DataError, AttributeError):
        raise ValueError(f"{path}: is no unfinished output of this command, remove it or name another file") from None
    if changed:
        name = sorted(changed)[0]
        raise ValueError(
            f"{path}: was begun with {name} {before.get(name)!r}, now it is {settings.get(name)!r}: use the same "
            "settings to continue, or remove the file to begin anew"
        )
