"""The commands `select`, `choose-teacher`, `generate` and `export`: what is parsed here is done elsewhere."""

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from lightning_itk.choice.candidates import Missing, in_order, read_candidates, response_statistics
from lightning_itk.choice.car import TeacherResponses, compatibility_adjusted_reward, rank_teachers
from lightning_itk.choice.rewards import RewardModel
from lightning_itk.cli.chosen import check_output, column_value, scan, text_to_embed, write_chosen
from lightning_itk.cli.tables import progress_bar, ranking_table, selection_table, verdicts
from lightning_itk.data.chat import ChatEncoder, ensure_chat_template
from lightning_itk.data.module import read_template
from lightning_itk.data.records import DataError
from lightning_itk.data.sources import Source, Sources, as_sources
from lightning_itk.data.subset import clusters_of, epochs_needed
from lightning_itk.files import replacing
from lightning_itk.models.export import export, load_student
from lightning_itk.models.generation import Generator, prompts_fingerprint, read_prompts
from lightning_itk.models.generation import generate as write_responses
from lightning_itk.models.hidden import check_head
from lightning_itk.models.loading import DType, load_causal_lm, load_tokenizer
from lightning_itk.selection.clusters import DEFAULT_EMBEDDER, embed, kmeans, write_clusters
from lightning_itk.selection.percentage import Metric, Order, describe, sample_scores
from lightning_itk.selection.percentage import select as select_samples
from lightning_itk.selection.scores import Scores, check_records, read_meta, read_scores


def select(
    scores: str,
    data: Sources,
    output: str,
    fraction: float = 0.1,
    metric: Literal["lp_app", "lp", "loss", "length", "random"] = "lp_app",
    order: Order = "lowest",
    clusters: int | str | None = None,
    embedder: str = DEFAULT_EMBEDDER,
    seed: int = 0,
) -> None:
    """Choose records by recorded scores and write them to a file, with a picture of the choice beside it.

    Args:
        scores: Scores file of ResponseLossRecorder, made on these data.
        data: The data that were scored: a file or hub name, or several, as in data.train.
        output: JSON Lines file to write: the chosen records as they are, in their order.
        fraction: Share of the scored records, in (0, 1].
        metric: lp_app or lp (learning percentage), loss (before training), length (response tokens) or random.
        order: lowest (of lp_app: learned late, hard), highest, middle or random.
        clusters: Choose the same share of every cluster: a number (embed the records and run k-means), a column of
            the records, or a Parquet file with the columns record and cluster.
        embedder: sentence-transformers model for a number of clusters.
        seed: Of random choices and of k-means.
    """
    sources, console = as_sources(data), Console()
    if len({(str(source.columns), source.teacher) for source in sources}) > 1:
        raise DataError("the sources differ in columns or teacher, which one output file cannot tell: select from each")
    if not 0 < fraction <= 1 or (isinstance(clusters, int) and clusters < 1):
        raise ValueError(
            f"fraction must be above 0 and at most 1, clusters at least 1, found {fraction} and {clusters}"
        )
    check_output(output, sources)
    ranked: Metric = "loss" if metric == "random" else metric
    read_meta(scores)  # what is wrong with the small file shows before the large ones are read
    keep = text_to_embed if isinstance(clusters, int) else None
    if isinstance(clusters, str) and not clusters.endswith(".parquet"):
        keep = column_value(clusters)  # type: ignore[assignment]
    found = scan(sources, keep)
    recorded = read_scores(scores, epochs=epochs_needed(ranked))
    check_records(recorded, found.fingerprint)
    values = sample_scores(ranked, recorded.losses, recorded.tokens)
    defined = int((~np.isnan(values)).sum())
    if round(fraction * defined) == 0:
        raise DataError(f"{scores}: nothing is chosen: fraction {fraction} of {defined} records with a score")
    labels = None
    if isinstance(clusters, int):
        labels = _clustered(Path(output), recorded, found.kept, ~np.isnan(values), clusters, embedder, seed, console)
    elif keep is not None:
        labels = np.array(found.kept)[recorded.record]
    elif clusters is not None:
        labels = clusters_of(str(clusters), recorded.record, found.fingerprint)
    chosen = select_samples(
        values, fraction, clusters=labels, order="random" if metric == "random" else order, seed=seed
    )
    summary = describe(values, recorded.tokens, chosen, seed=seed + 1)
    write_chosen(output, sources, recorded.record[chosen])
    rule = "random" if metric == "random" else f"{order} {metric}"
    console.print(selection_table(recorded, summary, found.count, rule, labels))
    console.print(f"wrote {len(chosen):,} records to {output}", soft_wrap=True, highlight=False)
    if find_spec("matplotlib") is None:
        console.print("no picture: pip install 'lightning-itk\\[report]'")
        return
    from lightning_itk.report.pictures import draw_selection

    groups, kind = labels, "cluster"
    if groups is None and len(sources) > 1:
        names = [Path(source.path).name for source in sources]
        groups, kind = np.repeat(names, found.source)[recorded.record], "source"
    picture = draw_selection(
        Path(output).with_suffix(".png"), values, recorded.tokens, chosen, metric=ranked, groups=groups, group_kind=kind
    )
    console.print(f"picture {picture}", soft_wrap=True, highlight=False)


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
    resamples: int = 2000,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Rank candidate teachers for a student by their responses to the same instructions: CAR and its rivals.

    CAR = mean reward / (1 + beta * mean response loss under the untuned student). Beside it stand its parts, the
    length, the rank-surprisal ratio (RSR, lower is better) and a paired bootstrap over the instructions.

    Args:
        student: Folder or hub name of the student, before any tuning.
        candidates: Name of a teacher -> file of its responses, as `generate` writes them; or {path, columns}.
        reward_column: The column that holds each response's reward; the default is `reward`.
        reward_model: Folder or hub name of a sequence classifier that gives the rewards instead.
        beta: Weight of the loss; 0 = the plain reward.
        shift: Added to every reward, because CAR needs them not negative; auto = what brings the lowest to 0.
        negative: allow = take single negative rewards as long as every teacher's mean is not negative.
        missing: drop = compare on the instructions that every candidate answered.
        output: JSON file for the table.
        max_length: Tokens per conversation.
        batch_size: Conversations at once.
        dtype: Precision of the student.
        chat_template: A Jinja chat template or a file that holds one; null = the student's, else the Alpaca prompt.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
        device: Where to run; auto = a GPU if there is one.
        trust_remote_code: Run code that comes with the models.
    """
    if reward_column and reward_model:
        raise ValueError("rewards come from reward_column or from reward_model, not from both")
    if max_length < 2 or batch_size < 1:
        raise ValueError(f"max_length must be at least 2 and batch_size 1, found {max_length} and {batch_size}")
    compatibility_adjusted_reward(0.0, 0.0, beta)  # refuses a beta below 0 before the models run
    files = {name: _one_source(given, f"candidate {name!r}") for name, given in candidates.items()}
    column = None if reward_model else reward_column or "reward"
    found = read_candidates(files, reward_column=column, missing=missing)
    where, console = _device(device), Console()
    encoder = ChatEncoder(load_tokenizer(student, trust_remote_code=trust_remote_code), read_template(chat_template))
    model = load_causal_lm(student, dtype=dtype, trust_remote_code=trust_remote_code)
    check_head(model)
    model.to(where)  # type: ignore[arg-type]
    judge = None
    if reward_model:
        judge = RewardModel(reward_model, device=where, trust_remote_code=trust_remote_code)
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
    asked = len(next(iter(found.answers.values()))) + found.dropped
    if ranking[0].prompts < asked:
        console.print(f"{asked - ranking[0].prompts:,} of {asked:,} instructions were dropped (missing: drop)")
    if output is not None:
        settings = {"student": student, "beta": beta, "shift": shift, "negative": negative, "missing": missing}
        settings |= {"rewards": reward_model or f"column {column}", "max_length": max_length, "instructions": asked}
        with replacing(output) as file:
            whole = settings | {"teachers": [asdict(row) for row in ranking]}
            file.write(json.dumps(whole, indent=2, ensure_ascii=False).encode() + b"\n")
        console.print(f"table {output}", soft_wrap=True, highlight=False)


def generate(
    model: str,
    prompts: Sources,
    output: str,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: DType = "auto",
    limit: int | None = None,
    teacher: str | None = None,
    chat_template: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Write a model's responses to prompts: training data, or a candidate teacher for `choose-teacher`.

    A run that is killed continues where it stopped when it is started again with the same settings.

    Args:
        model: Folder or hub name of the model, with its tokenizer.
        prompts: File or hub name of the prompts; responses in it are ignored.
        output: JSON Lines file to write: the prompts' columns, response, teacher, and whether the model ended it.
        max_new_tokens: Longest response.
        batch_size: Prompts at once, of similar length.
        temperature: 0 takes the likeliest token each time; 1 draws from the model's own distribution.
        seed: Of drawing.
        dtype: Precision of the weights; auto keeps the model's.
        limit: Answer only so many prompts, the first; null = all.
        teacher: Tag of the records; null = the name of the model.
        chat_template: A Jinja chat template or a file that holds one; null = the tokenizer's, else the Alpaca prompt.
        device: Where to run; auto = a GPU if there is one.
        trust_remote_code: Run code that comes with the model.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size and limit must be at least 1, found {batch_size} and {limit}")
    source, console = _one_source(prompts, "prompts"), Console()
    if Path(output).exists():
        raise ValueError(f"{output}: exists already, remove it or name another file")
    found = read_prompts(source, limit)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    ensure_chat_template(tokenizer, read_template(chat_template))
    loaded = load_causal_lm(model, dtype=dtype, trust_remote_code=trust_remote_code)
    loaded.to(_device(device))  # type: ignore[arg-type]
    drawing = {"temperature": temperature, "seed": seed, "max_new_tokens": max_new_tokens}
    generator = Generator(loaded, tokenizer, **drawing)  # type: ignore[arg-type]
    name = teacher or Path(model).name
    settings: dict[str, Any] = drawing | {
        "model": model,
        "dtype": str(loaded.dtype),
        "batch_size": batch_size,
        "prompts": prompts_fingerprint(found),
        "template": generator.encoder.fingerprint(),
        "teacher": name,
    }
    with progress_bar("generating", len(found)) as advance:
        records = write_responses(
            generator, source, found, output, settings, teacher=name, batch_size=batch_size, progress=advance
        )
    texts = [record["response"] if "response" in record else record["messages"][-1]["content"] for record in records]
    cut = sum(not record["finished"] for record in records)
    empty = sum(not text.strip() for text in texts)
    console.print(f"wrote {len(records):,} responses to {output}", soft_wrap=True, highlight=False)
    if cut or empty:
        console.print(f"{cut:,} were cut off at max_new_tokens={max_new_tokens}, {empty:,} are empty", soft_wrap=True)


def export_checkpoint(
    ckpt: str,
    output: str,
    student: str | None = None,
    tokenizer: str | None = None,
    dtype: DType = "auto",
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Turn a checkpoint of a training run into a Hugging Face folder: weights (adapters merged), tokenizer, template.

    No teacher is loaded, and nothing in the checkpoint is executed.

    Args:
        ckpt: Checkpoint file of any module of this kit.
        output: Folder to write; one that exists is replaced.
        student: The folder or hub name that training began with; null = what the checkpoint says.
        tokenizer: Folder or hub name of the tokenizer; null = the student's.
        dtype: Precision of the saved weights; auto = as they were trained.
        chat_template: The Jinja chat template of the data module, or a file that holds it; null = the tokenizer's,
            else the Alpaca prompt.
        trust_remote_code: Run code that comes with the student.
    """
    trained = load_student(ckpt, student, trust_remote_code=trust_remote_code)
    words = load_tokenizer(tokenizer or trained.name, trust_remote_code=trust_remote_code)
    ensure_chat_template(words, read_template(chat_template))
    export(trained.model, words, output, dtype=dtype)
    Console().print(f"wrote {output} (step {trained.step:,})", soft_wrap=True, highlight=False)


def _one_source(given: Any, what: str) -> Source:
    sources = as_sources(given)
    if len(sources) != 1:
        raise ValueError(f"{what} names {len(sources)} files, expected one")
    return sources[0]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def _clustered(
    output: Path, recorded: Scores, texts: list[str], defined: Any, count: int, embedder: str, seed: int, console: Any
) -> np.ndarray:
    """k-means clusters of the scored records, also written beside the output so that they need not be made again."""
    if find_spec("sklearn") is None:  # known before the embedding, which takes longest
        raise ImportError("clustering needs scikit-learn: pip install 'lightning-itk[cluster]'")
    rows = np.flatnonzero(defined)
    vectors = embed([texts[record] for record in recorded.record[rows]], embedder, progress=console.is_terminal)
    labels = np.full(len(defined), -1, np.int64)
    labels[rows] = kmeans(vectors, count, seed)
    path = output.with_suffix(".clusters.parquet")
    write_clusters(path, recorded.record[rows], labels[rows], recorded.meta["fingerprint"])
    console.print(f"clusters {path} (give it to --clusters or data.subset.clusters)", soft_wrap=True, highlight=False)
    return labels
