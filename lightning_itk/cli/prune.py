"""`prune`: a smaller student out of a model."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console

from lightning_itk.cli.console import device_of, one_source, progress_bar
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.records import DataError
from lightning_itk.data.sources import Sources, read
from lightning_itk.data.special_tokens import SpecialTokens
from lightning_itk.data.template import read_template
from lightning_itk.data.tools import Tools
from lightning_itk.hub import load_tokenizer
from lightning_itk.models.export import check_replaceable, export
from lightning_itk.models.loading import DType, load_causal_lm
from lightning_itk.models.pruning import block_influence, decoder_layers, keep_layers, layers_to_keep


def prune_model(
    model: str,
    layers: str,
    output: str,
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
    """Make a smaller student out of a model: some of its layers, its own tokenizer.

    The student's config.json notes which layers it has; the attention term then pairs each with its original.

    Args:
        model: Folder, hub name or .gguf file of the model, with its tokenizer.
        layers: How many layers to keep (those of greatest block influence on `data`), every:N, or which: 0,1,5.
        output: Folder to write.
        data: Calibration records, as in data.train, for a number of layers; a few dozen are enough.
        limit: Read only so many records, the first.
        max_length: Tokens of a record, prompt and response, that are used.
        dtype: Precision of the weights; auto keeps the model's.
        chat_template: A Jinja chat template or a file that holds one; null = the tokenizer's, else the Alpaca prompt.
        special_tokens: As in data.special_tokens: text = names of special tokens in the records are text.
        tools: As in data.tools: learn = take records with calls of tools.
        device: Where to measure the influence; auto = a GPU if there is one.
        trust_remote_code: Run code that comes with the model.
        overwrite: Replace an earlier export; anything else in the folder is never touched.
    """
    if limit < 1 or max_length < 1:
        raise ValueError(f"limit and max_length must be at least 1, found {limit} and {max_length}")
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

    def influence() -> list[float]:
        whole.to(device_of(device))  # type: ignore[arg-type]
        with progress_bar("measuring influence", len(sequences)) as advance:

            def told() -> Iterator[np.ndarray]:
                for number, ids in enumerate(sequences):
                    yield ids
                    advance(number + 1)

            found = block_influence(whole, told())
        whole.to("cpu")  # type: ignore[arg-type]
        least = ", ".join(f"{layer} ({found[layer]:.3f})" for layer in np.argsort(found, kind="stable")[:5])
        console.print(f"least influence: layers {least}", soft_wrap=True, highlight=False)
        return found

    kept = layers_to_keep(layers, count, influence if sequences else None)
    if len(kept) == count:
        raise ValueError(f"layers: {layers!r} keeps all {count} layers of the model")
    student = keep_layers(whole, kept)
    export(student, tokenizer, folder)
    left = sum(p.numel() for p in student.parameters()) / sum(p.numel() for p in whole.parameters())
    named = ",".join(map(str, kept))
    console.print(f"wrote {output}: {len(kept)} of {count} layers, {left:.0%} of the weights", soft_wrap=True)
    console.print(f"kept layers {named}", soft_wrap=True, highlight=False)
