"""How many tokens a small training file lets a model learn, counted without a cache."""

from itertools import islice
from pathlib import Path
from typing import Any

from lightning_itk.cli.configured import loading_of_student
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.module import read_template
from lightning_itk.data.sources import as_sources, read
from lightning_itk.hub import load_tokenizer

_LARGEST = 16 * 2**20  # bytes of all files together: some seconds


def learned_tokens(data: Any, init: Any) -> int | None:
    """Learned tokens of the training files; None where they are large, elsewhere, or cannot be read."""
    try:
        sources = as_sources(data.train)
        if not all(source.is_file for source in sources):
            return None
        if sum(Path(source.path).stat().st_size for source in sources) > _LARGEST:
            return None
        how = {} if data.tokenizer else loading_of_student(init)
        tokenizer = load_tokenizer(data.tokenizer or init.student, **how)
        encoder = ChatEncoder(tokenizer, read_template(data.chat_template), data.special_tokens)
        total = 0
        for source in sources:
            records = read(source, tools=data.tools)
            while some := list(islice(records, 256)):
                encoded = encoder.encode([record.messages for record in some], data.max_length)
                spans = [each.truncated(data.max_length).spans for each in encoded]
                total += sum(int((span[:, 1] - span[:, 0]).sum()) for span in spans)
    except (OSError, ValueError):  # fit says what is wrong with its data
        return None
    return total
