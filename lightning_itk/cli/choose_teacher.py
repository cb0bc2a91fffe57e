"""`choose-teacher`: rank candidate teachers for a student by their responses."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_itk.choice.candidates import Missing, in_order, read_candidates, response_statistics
from lightning_itk.choice.car import (
    TeacherRank,
    TeacherResponses,
    compatibility_adjusted_reward,
    rank_teachers,
    shift_warning,
)
from lightning_itk.choice.rewards import RewardModel
from lightning_itk.cli.console import device_of, one_source, progress_bar
from lightning_itk.cli.records import check_not_data
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.records import DataError
from lightning_itk.data.special_tokens import SpecialTokens
from lightning_itk.data.template import read_template
from lightning_itk.data.tools import Tools
from lightning_itk.files import atomic_write
from lightning_itk.hub import load_tokenizer
from lightning_itk.models.hidden import check_head
from lightning_itk.models.loading import DType, load_causal_lm
from lightning_itk.outputs import check_output, note_output


def choose_teacher(
    student: str,
    candidates: dict[str, Any],
    reward_column: str | None = None,
    reward_model: str | None = None,
    beta: float = 3.0,
    shift: float | Literal["auto"] = 0.0,
    negative: Literal["refuse", "allow"] = "refuse",
    missing: Missing = "refuse",
    output: str | None = None,
    max_length: int = 2048,
    batch_size: int = 8,
    dtype: DType = "float32",
    chat_template: str | None = None,
    special_tokens: SpecialTokens = "text",
    tools: Tools = "refuse",
    resamples: int = 2000,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Rank candidate teachers for a student by their responses to the same instructions: CAR and its rivals.

    CAR = mean reward / (1 + beta * mean response loss under the untuned student). Beside it stand its parts, the
    length, the rank-surprisal ratio (RSR, lower is better) and a paired bootstrap over the instructions.

    Args:
        student: Folder, hub name or .gguf file of the student, before any tuning.
        candidates: Name of a teacher -> file of its responses, as `generate` writes them; or {path, columns}.
        reward_column: The column that holds each response's reward; the default is `reward`.
        reward_model: Folder or hub name of a sequence classifier that gives the rewards instead.
        beta: Weight of the loss; 0 = the plain reward.
        shift: Added to every reward, because CAR needs them not negative; auto = what brings the lowest mean of a
            teacher to 0, nothing if no mean is negative. A shift that changes the ranking is said.
        negative: allow = take single negative rewards as long as every teacher's mean is not negative.
        missing: drop = compare on the instructions that every candidate answered.
        output: JSON file for the table.
        max_length: Tokens per conversation.
        batch_size: Conversations at once.
        dtype: Precision of the student.
        chat_template: A Jinja chat template or a file that holds one; null = the student's, else the Alpaca prompt.
        special_tokens: As in data.special_tokens: text = names of special tokens in the responses are text.
        tools: As in data.tools: learn = take responses that call tools.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
        device: Where to run; auto = a GPU if there is one.
        trust_remote_code: Run code that comes with the models.
        overwrite: Replace a table that an earlier run wrote, if it is unchanged; nothing else is ever replaced.
    """
    if reward_column and reward_model:
        raise ValueError("rewards come from reward_column or from reward_model, not from both")
    if max_length < 2 or batch_size < 1:
        raise ValueError(f"max_length must be at least 2 and batch_size 1, found {max_length} and {batch_size}")
    compatibility_adjusted_reward(0.0, 0.0, beta)  # refuses a beta below 0 before the models run
    files = {name: one_source(given, f"candidate {name!r}") for name, given in candidates.items()}
    if output is not None:
        check_not_data(output, files.values())
        check_output(output, overwrite)
    column = None if reward_model else reward_column or "reward"
    found = read_candidates(files, reward_column=column, missing=missing, tools=tools)
    where, console = device_of(device), Console()
    tokenizer = load_tokenizer(student, trust_remote_code=trust_remote_code)
    encoder = ChatEncoder(tokenizer, read_template(chat_template), special_tokens)
    model = load_causal_lm(student, dtype=dtype, trust_remote_code=trust_remote_code)
    check_head(model)
    model.to(where)  # type: ignore[arg-type]
    judge = None
    if reward_model:
        loading: Any = {"device": where, "trust_remote_code": trust_remote_code}
        judge = RewardModel(reward_model, special_tokens=special_tokens, **loading)
    teachers = {}
    for name, answers in found.answers.items():
        conversations = [answer.messages for answer in answers if answer.messages is not None]
        with progress_bar(f"scoring {name}", len(conversations)) as advance:
            loss, rank, tokens = response_statistics(
                model, encoder, conversations, max_length=max_length, batch_size=batch_size, progress=advance
            )
        if missing == "refuse" and (cut := (tokens == 0).nonzero().flatten().tolist()):
            place = answers[cut[0]].place
            raise DataError(f"{place}: max_length={max_length} leaves no response ({len(cut)} of {name!r})")
        rewards = np.array([answer.reward for answer in answers])
        if judge is not None:
            with progress_bar(f"judging {name}", len(conversations)) as advance:
                rewards = in_order(answers, judge(conversations, batch_size=batch_size, progress=advance))
        placed = (in_order(answers, values.double().numpy()) for values in (loss, tokens, rank))
        teachers[name] = TeacherResponses(rewards, *placed)
    ranking = rank_teachers(
        teachers, beta=beta, shift=shift, negative=negative, missing=missing, resamples=resamples, seed=seed
    )
    console.print(ranking_table(ranking))
    console.print("\n".join(verdicts(ranking)), soft_wrap=True, highlight=False)
    for name, answers in found.answers.items():
        if count := sum(not answer.finished for answer in answers):
            console.print(f"{name}: {count:,} of {len(answers):,} answers are cut off (finished: false)")
    asked = len(next(iter(found.answers.values()))) + found.dropped
    if ranking[0].prompts < asked:
        console.print(f"{asked - ranking[0].prompts:,} of {asked:,} instructions were dropped (missing: drop)")
    if output is not None:
        check_output(output, overwrite)  # again: the models took their time
        settings = {"student": student, "beta": beta, "shift": shift, "negative": negative, "missing": missing}
        settings |= {"rewards": reward_model or f"column {column}", "max_length": max_length, "instructions": asked}
        with atomic_write(output) as file:
            whole = settings | {"teachers": [asdict(row) for row in ranking], "verdicts": verdicts(ranking)}
            file.write(json.dumps(whole, indent=2, ensure_ascii=False).encode() + b"\n")
        note_output(output)
        console.print(f"table {output}", soft_wrap=True, highlight=False)


def ranking_table(ranking: Sequence[TeacherRank]) -> Table:
    """Teachers by falling CAR, its parts and its rivals beside it."""
    title = f"{ranking[0].prompts:,} instructions" + (f", rewards + {shift:.4g}" if (shift := ranking[0].shift) else "")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("teacher", overflow="fold")
    for name in ("CAR", "95 % interval", "best", "reward", "loss", "RSR", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in ranking:
        low, high = row.interval
        rsr = "" if row.rsr is None else f"{row.rsr:.2f}"
        cells = (f"{row.car:.4g}", f"{low:.3g} to {high:.3g}", f"{row.best:.0%}", f"{row.reward:.4g}")
        table.add_row(row.teacher, *cells, f"{row.loss:.3f}", rsr, f"{row.length:.1f}")
    return table


def verdicts(ranking: Sequence[TeacherRank]) -> list[str]:
    """Who is best, who cannot be told apart, and whether the shift decided, as sentences. Every pair is named once."""
    names = [row.teacher for row in ranking]
    said = []
    for place, row in enumerate(ranking):
        below = [name for name in row.tied_with if names.index(name) > place]
        if below:
            said.append(f"{row.teacher} cannot be told apart from {', '.join(below)}")
        elif place == 0:
            said.append(f"{row.teacher} is the best teacher for this student by CAR")
    return [*said, *filter(None, [shift_warning(ranking)])]
