"""Candidate teachers' responses to the same instructions: read, matched by prompt, and scored under the student."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lightning_itk.batch import Sample, pad, response_rows
from lightning_itk.choice.statistics import SampleStatistics, sample_statistics
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.records import RESPONSES, DataError, Message, Record, check
from lightning_itk.data.sources import Source, parse_chunk, read_chunks
from lightning_itk.data.tools import Tools
from lightning_itk.losses.chunked import linear_token_scores
from lightning_itk.models.hidden import hidden_states

Missing = Literal["refuse", "drop"]


class RatedResponse(NamedTuple):
    """One response of one candidate."""

    messages: list[Message] | None  # the whole conversation; None = there is no response
    reward: float  # nan = none
    place: str  # in its file
    finished: bool = True  # False = cut off when it was generated


class Candidates(NamedTuple):
    """The responses of all candidates to the prompts that they share."""

    answers: dict[str, list[RatedResponse]]  # per candidate [prompts], in the order of the first candidate's file
    dropped: int  # prompts that some candidate was not asked


def read_candidates(
    files: Mapping[str, Source],
    *,
    reward_column: str | None = None,
    missing: Missing = "refuse",
    tools: Tools = "refuse",
) -> Candidates:
    """Read every candidate's file and match them by prompt, whatever the order of their records.

    Args:
        files: candidate -> its responses.
        reward_column: where the reward of each response is; None = rewards come from elsewhere and are nan here.
        missing: drop = keep the prompts that are in every file; a response or reward that is not there becomes None
            or nan.
        tools: learn = take responses that call tools.

    Raises:
        DataError: fewer than two candidates, other prompts than the first candidate's, no common prompt; a missing
            or broken response or reward.
    """
    if len(files) < 2:
        raise DataError(f"choosing takes at least two candidates, found {len(files)}")
    tables = {name: _read(source, reward_column, missing, tools) for name, source in files.items()}
    (first, table), *others = tables.items()
    for name, other in others:
        for here, there, mine, theirs in ((first, name, table, other), (name, first, other, table)):
            extra = [answer.place for key, answer in mine.items() if key not in theirs]
            if extra and missing == "refuse":
                raise DataError(
                    f"candidates {here!r} and {there!r} answer different instructions: {len(extra)} of {len(mine)} of "
                    f"{here!r} are not among those of {there!r}, the first at {extra[0]} (missing drop keeps the "
                    "common ones)"
                )
    common = [key for key in table if all(key in other for other in tables.values())]
    if not common:
        raise DataError(f"candidates {', '.join(tables)} have no instruction in common")
    every = set().union(*tables.values())
    return Candidates(
        {name: [answers[key] for key in common] for name, answers in tables.items()}, len(every) - len(common)
    )


def _read(
    source: Source, reward_column: str | None, missing: Missing, tools: Tools
) -> dict[tuple[bytes, int], RatedResponse]:
    """Answers by prompt; a prompt that comes again counts as another one."""
    found: dict[tuple[bytes, int], RatedResponse] = {}
    for chunk in read_chunks(source):
        for record in parse_chunk(chunk, source, need_response=False, tools=tools):
            original = chunk.original(record)
            answer = RatedResponse(
                _conversation(original, record, source.columns or {}, missing, tools),
                math.nan if reward_column is None else _reward(original, reward_column, record.place, missing),
                record.place,
                original.get("finished") is not False,
            )
            digest, again = record.digest(), 0
            while (digest, again) in found:
                again += 1
            found[digest, again] = answer
    return found


def _conversation(
    original: dict[str, Any], record: Record, columns: Mapping[str, str], missing: Missing, tools: Tools
) -> list[Message] | None:
    try:
        return check(original, columns, tools=tools)[0]
    except DataError as error:
        if missing == "drop" and _is_empty(original, columns):
            return None
        hint = " (missing drop leaves this instruction out)" if _is_empty(original, columns) else ""
        raise DataError(f"{record.place}: {error}{hint}") from None


def _is_empty(original: dict[str, Any], columns: Mapping[str, str]) -> bool:
    """Whether a record has no response, rather than a broken one."""
    names = [columns[name] for name in RESPONSES if name in columns] or list(RESPONSES)
    given = [original[name] for name in names if original.get(name) is not None]
    turns = original.get("messages", original.get("conversations"))
    if isinstance(turns, list) and turns:
        last = turns[-1]
        given += [last.get("content", last.get("value"))] if last.get("role", last.get("from")) != "user" else []
    return all(isinstance(text, str) and not text.strip() for text in given)


def _reward(original: dict[str, Any], column: str, place: str, missing: Missing) -> float:
    value = original.get(column)
    if value is None:
        if missing == "drop" and column in original:
            return math.nan
        raise DataError(f"{place}: no reward in column {column!r}, found {', '.join(original)}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{place}: reward {value!r} in column {column!r}, expected a finite number")
    return float(value)


@torch.no_grad()
def response_statistics(
    student: PreTrainedModel,
    encoder: ChatEncoder,
    conversations: Sequence[Sequence[Message]],
    *,
    max_length: int = 2048,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda done: None,
) -> SampleStatistics:
    """Loss and rank of each conversation's last turn under a student, tokenized and masked as in training.

    Args:
        student: the untuned student.
        encoder: its tokenizer and chat template.
        conversations: each ends with the turn to score; earlier turns of the assistant are context.
        max_length: tokens per conversation; the rest is cut off.
        batch_size: conversations at once, of similar length.
        progress: told how many are done.

    Returns:
        Means over the response tokens [conversations], stop token included; nan where the cut leaves none.
    """
    samples = []
    for number, encoded in enumerate(encoder.encode(conversations, max_length)):
        cut = encoded._replace(spans=encoded.spans[-1:]).truncated(max_length)
        samples.append(Sample(cut.input_ids, cut.labels(), number))
    lengths = np.array([len(sample.input_ids) for sample in samples], np.int64)
    order = np.argsort(-lengths, kind="stable")
    training, device = student.training, student.device
    student.eval()
    count = len(samples)
    loss, rank = torch.full((count,), torch.nan, dtype=torch.float64), torch.full((count,), torch.nan).double()
    tokens = torch.zeros(count, dtype=torch.long)
    try:
        for start in range(0, count, batch_size):
            rows = order[start : start + batch_size]
            batch = pad([samples[row]._replace(sample_id=place) for place, row in enumerate(rows)], pad_id=0)
            batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}  # type: ignore
            places, targets, _ = response_rows(batch)
            states, head = hidden_states(student, batch)
            scores = linear_token_scores(states.flatten(0, 1)[places], head, targets, ranks=True)
            means = sample_statistics(scores, batch["sample_ids"].flatten()[places], len(rows))
            index = torch.from_numpy(rows.copy())
            loss[index], rank[index], tokens[index] = means.loss.cpu(), means.rank.cpu(), means.tokens.cpu()
            progress(min(start + batch_size, count))
    finally:
        student.train(training)
    return SampleStatistics(loss, rank, tokens)


def in_order(answers: Sequence[RatedResponse], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values of the answers that are there, back at their places [prompts]; nan at the others."""
    placed = np.full(len(answers), np.nan)
    placed[[answer.messages is not None for answer in answers]] = values
    return placed
