"""`prune`: a smaller student out of a model."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from transformers import PreTrainedModel

from lightning_itk.cli.console import device_of, one_source, progress_bar
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.records import DataError
from lightning_itk.data.sources import Sources, read
from lightning_itk.data.special_tokens import SpecialTokens
from lightning_itk.data.template import read_template
from lightning_itk.data.tools import Tools
from lightning_itk.hub import load_tokenizer
from lightning_itk.models.experts import count_experts, dense, expert_use, experts_to_keep, keep_experts
from lightning_itk.models.export import check_replaceable, export
from lightning_itk.models.loading import DType, load_causal_lm
from lightning_itk.models.pruning import block_influence, decoder_layers, expert_blocks, keep_layers, layers_to_keep

T = TypeVar("T")


def prune_model(
    model: str,
    output: str,
    layers: str | None = None,
    experts: str | None = None,
    data: Sources | None = None,
    limit: int = 64,
    max_length: int = 512,
    dtype: DType = "auto",
    chat_template: str | None = None,
    special_tokens: SpecialTokens = "text",
    tools: Tools = "refuse",
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Make a smaller student out of a model: some of its layers, some of a mixture's experts, its own tokenizer.

    The student's config.json notes which layers and experts it has; the attention term then pairs each layer with its
    original.

    Args:
        model: Folder, hub name or .gguf file of the model, with its tokenizer.
        output: Folder to write.
        layers: How many layers to keep (those of greatest block influence on `data`), every:N, or which: 0,1,5.
        experts: How many experts each layer of a mixture keeps (those that get most of the routing weight on `data`),
            or dense: that one alone, without a router, so that a Mixtral becomes a Mistral, a Qwen3-MoE a Qwen3.
        data: Calibration records, as in data.train, for experts or a number of layers; a few dozen are enough.
        limit: Read only so many records, the first.
        max_length: Tokens of a record, prompt and response, that are used.
        dtype: Precision of the weights; auto keeps the model's.
        chat_template: A Jinja chat template or a file that holds one; null = the tokenizer's, else the Alpaca prompt.
        special_tokens: As in data.special_tokens: text = names of special tokens in the records are text.
        tools: As in data.tools: learn = take records with calls of tools.
        device: Where to measure the model; auto = a GPU if there is one.
        trust_remote_code: Run code that comes with the model.
        overwrite: Replace an earlier export; anything else in the folder is never touched.
    """
    if limit < 1 or max_length < 1:
        raise ValueError(f"limit and max_length must be at least 1, found {limit} and {max_length}")
    if layers is None and experts is None:
        raise ValueError("nothing to prune: say which layers (--layers), how many experts (--experts), or both")
    folder, console = Path(output), Console()
    if folder.exists() and not overwrite:
        raise ValueError(f"{output}: exists already; --overwrite true replaces an earlier export")
    check_replaceable(folder)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    encoder = ChatEncoder(tokenizer, read_template(chat_template), special_tokens)
    sequences: list[np.ndarray] = []
    if data is not None:
        source = one_source(data, "data")
        records = list(islice(read(source, tools=tools), limit))
        if not records:
            raise DataError(f"{source.name}: holds no records")
        encoded = encoder.encode([record.messages for record in records], max_length)
        sequences = [conversation.truncated(max_length).input_ids for conversation in encoded]
    whole = load_causal_lm(model, dtype=dtype, trust_remote_code=trust_remote_code)
    count = len(decoder_layers(whole)[1])
    if experts is not None:
        count_experts(whole)  # refuses a model without any before it runs
        if not sequences:
            raise ValueError("experts: they are chosen by their use on records: name some (data)")

    def measured(what: str, measure: Callable[[PreTrainedModel, Iterable[np.ndarray]], T]) -> T:
        whole.to(device_of(device))  # type: ignore[arg-type]
        with progress_bar(f"measuring {what}", len(sequences)) as advance:

            def told() -> Iterator[np.ndarray]:
                for number, ids in enumerate(sequences):
                    yield ids
                    advance(number + 1)

            found = measure(whole, told())
        whole.to("cpu")  # type: ignore[arg-type]
        return found

    def influence() -> list[float]:
        found = measured("influence", block_influence)
        least = ", ".join(f"{layer} ({found[layer]:.3f})" for layer in np.argsort(found, kind="stable")[:5])
        console.print(f"least influence: layers {least}", soft_wrap=True, highlight=False)
        return found

    student, kept = whole, list(range(count))
    if layers is not None:
        kept = layers_to_keep(layers, count, influence if sequences else None)
        if len(kept) == count:
            raise ValueError(f"layers: {layers!r} keeps all {count} layers of the model")
        student = keep_layers(whole, kept)
    said = f"{len(kept)} of {count} layers"
    if experts is not None:
        routed = [row for row, layer in enumerate(expert_blocks(whole)) if layer in kept]
        use = measured("use of experts", expert_use)[routed]
        chosen = experts_to_keep(experts, use)
        share = float(np.mean([use[row, own].sum() for row, own in enumerate(chosen)]))
        student = dense(student, [own for (own,) in chosen]) if experts == "dense" else keep_experts(student, chosen)
        said += f", {len(chosen[0])} of {use.shape[1]} experts with {share:.0%} of the routing weight"
    export(student, tokenizer, folder)
    left = sum(p.numel() for p in student.parameters()) / sum(p.numel() for p in whole.parameters())
    named = ",".join(map(str, kept))
    console.print(f"wrote {output}: {said}, {left:.0%} of the weights", soft_wrap=True)
    console.print(f"kept layers {named}", soft_wrap=True, highlight=False)
