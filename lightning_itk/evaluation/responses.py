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

from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.records import (
    CONTEXTS,
    CONVERSATIONS,
    PROMPTS,
    RESPONSES,
    DataError,
    Fingerprint,
    Message,
    Record,
    check,
    parse_line,
    written,
)
from lightning_itk.data.sources import Source, parse_chunk, read_chunks
from lightning_itk.data.tools import Tools
from lightning_itk.files import atomic_write
from lightning_itk.models.generation import Generator, Response
from lightning_itk.outputs import check_output, note_output


class Prompt(NamedTuple):
    """A prompt and the record that it came from."""

    record: Record  # its messages, without the response
    original: dict[str, Any]


def read_prompts(source: Source, limit: int | None = None, *, tools: Tools = "refuse") -> list[Prompt]:
    """The first `limit` prompts of a source (None = all); responses in it are ignored. tools: as for training.

    Raises:
        DataError: as for training, but a response may be missing.
    """
    prompts: list[Prompt] = []
    for chunk in read_chunks(source):
        records = parse_chunk(chunk, source, need_response=False, tools=tools)
        prompts += (Prompt(record, chunk.original(record)) for record in records)
        if limit is not None and len(prompts) >= limit:
            break
    return prompts[:limit]


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of prompts in their order."""
    fingerprint = Fingerprint()
    fingerprint.add(b"".join(prompt.record.digest() for prompt in prompts))
    return str(fingerprint)


def prompt_ids(encoder: ChatEncoder, prompts: Sequence[Prompt], generator: Generator) -> list[np.ndarray]:
    """Token ids of prompts through the chat template.

    Raises:
        DataError: a prompt that the template refuses, or that leaves the model no room for an answer.
    """
    room = getattr(generator.model.config.get_text_config(), "max_position_embeddings", None)
    found = []
    for prompt in prompts:
        try:
            ids = encoder.prompt_ids(prompt.record.messages)
        except ValueError as error:
            raise DataError(f"{prompt.record.place}: {error}") from None
        if room is not None and len(ids) + generator.max_new_tokens > room:
            raise DataError(
                f"{prompt.record.place}: {len(ids)} prompt tokens and {generator.max_new_tokens} new ones are more "
                f"than the {room} positions of the model"
            )
        found.append(ids)
    return found


def answered(prompt: Prompt, columns: Mapping[str, str], response: Response, teacher: str | None) -> dict[str, Any]:
    """A record that holds a prompt as it came and a response to it, in a form that needs no column map."""
    left_out = {*RESPONSES, *CONVERSATIONS, "teacher", "is_domain", *columns.values()}
    fields = {name: value for name, value in prompt.original.items() if name not in left_out}
    fields |= {
        name: prompt.original[column]
        for name, column in columns.items()
        if name not in left_out and column in prompt.original
    }
    more: dict[str, Any] = {"teacher": teacher} if teacher else {}
    more |= {"finished": response.finished, "record": prompt.record.number}
    try:  # instruction with response, where that says it all
        if check({**fields, "response": "a"}, {}, tools="learn")[0][:-1] == prompt.record.messages:
            return {**fields, "response": response.text, **more}
    except DataError:
        pass
    messages: list[Message] = [*written(prompt.record.messages), {"role": "assistant", "content": response.text}]
    if described := prompt.record.messages[0].get("tools"):
        fields["tools"] = described
    kept = {name: value for name, value in fields.items() if name not in (*PROMPTS, *CONTEXTS, "system")}
    return {**kept, "messages": messages, **more}


def write_responses(
    generator: Generator,
    encoder: ChatEncoder,
    source: Source,
    prompts: Sequence[Prompt],
    output: str | Path,
    settings: Mapping[str, Any],
    *,
    teacher: str | None = None,
    batch_size: int = 8,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Answer all prompts and write the records; continue where a killed run of the same settings stopped.

    Args:
        generator: who answers.
        encoder: turns the prompts into token ids.
        source: where the prompts come from, for its column map.
        prompts: the prompts.
        output: JSON Lines file to write, in the order of the prompts.
        settings: everything that the responses depend on, as plain JSON.
        teacher: the tag of the records; None = none.
        batch_size: prompts at once, of similar length; it belongs to the settings.
        overwrite: replace a file that an earlier run wrote and nobody changed; any other is refused.
        progress: told how many prompts are answered.

    Returns:
        The records.

    Raises:
        ValueError: the output exists, cannot be written, or was begun with other settings; a prompt is too long.
    """
    output = Path(output)
    check_output(output, overwrite)
    ids = prompt_ids(encoder, prompts, generator)
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
    check_output(output, overwrite)  # again: answering took its time
    with atomic_write(output) as whole:
        for record in done:
            whole.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    note_output(output)
    partial.unlink()
    return done


@contextmanager
def _partial(path: Path, settings: dict[str, Any]) -> Iterator[tuple[Any, dict[int, dict[str, Any]]]]:
    """The file of an unfinished run, open to append to, and what it holds. A half-written last line is cut off."""
    header = json.dumps(settings, ensure_ascii=False).encode() + b"\n"
    records: dict[int, dict[str, Any]] = {}
    if path.is_symlink():
        raise ValueError(f"{path}: is a link, move it away or name another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            first = file.readline()
            if not header.startswith(first) or first == header:
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
