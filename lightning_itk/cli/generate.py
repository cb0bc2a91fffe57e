"""`generate`: write a model's responses to prompts."""

from typing import Any

from rich.console import Console

from lightning_itk.cli.console import device_of, one_source, progress_bar
from lightning_itk.cli.records import check_not_data
from lightning_itk.data.chat import ChatEncoder
from lightning_itk.data.sources import Sources
from lightning_itk.data.special_tokens import SpecialTokens
from lightning_itk.data.template import read_template
from lightning_itk.data.tools import Tools
from lightning_itk.evaluation.responses import prompts_fingerprint, read_prompts, write_responses
from lightning_itk.hub import load_tokenizer
from lightning_itk.models.generation import Generator
from lightning_itk.models.loading import DType, load_causal_lm
from lightning_itk.outputs import check_output


def generate_responses(
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
    special_tokens: SpecialTokens = "text",
    tools: Tools = "refuse",
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a model's responses to prompts: training data, or a candidate teacher for `choose-teacher`.

    A run that is killed continues where it stopped when it is started again with the same settings.

    Args:
        model: Folder, hub name or .gguf file of the model, with its tokenizer.
        prompts: File, folder, glob, URL or hub name of the prompts; responses in it are ignored.
        output: JSON Lines file to write: the prompts' columns, response, and whether the model ended it.
        max_new_tokens: Longest response.
        batch_size: Prompts at once, of similar length.
        temperature: 0 takes the likeliest token each time; 1 draws from the model's own distribution.
        seed: Of drawing.
        dtype: Precision of the weights; auto keeps the model's.
        limit: Answer only so many prompts, the first; null = all.
        teacher: Tag of the records, by which DAE finds their teacher; null = none.
        chat_template: A Jinja chat template or a file that holds one; null = the tokenizer's, else the Alpaca prompt.
        special_tokens: As in data.special_tokens: text = names of special tokens in the prompts are text.
        tools: As in data.tools: learn = take prompts with tools.
        device: Where to run; auto = a GPU if there is one.
        trust_remote_code: Run code that comes with the model.
        overwrite: Replace what an earlier run wrote, if it is unchanged; nothing else is ever replaced.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size and limit must be at least 1, found {batch_size} and {limit}")
    source, console = one_source(prompts, "prompts"), Console()
    check_not_data(output, [source])
    check_output(output, overwrite)
    found = read_prompts(source, limit, tools=tools)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    encoder = ChatEncoder(tokenizer, read_template(chat_template), special_tokens)
    loaded = load_causal_lm(model, dtype=dtype, trust_remote_code=trust_remote_code)
    loaded.to(device_of(device))  # type: ignore[arg-type]
    drawing = {"temperature": temperature, "seed": seed, "max_new_tokens": max_new_tokens}
    generator = Generator(loaded, tokenizer, stops=encoder.stop_tokens(), **drawing)  # type: ignore[arg-type]
    settings: dict[str, Any] = drawing | {
        "model": model,
        "dtype": str(loaded.dtype),
        "batch_size": batch_size,
        "prompts": prompts_fingerprint(found),
        "template": encoder.fingerprint(),
        "teacher": teacher,
    }
    with progress_bar("generating", len(found)) as advance:
        options: dict[str, Any] = {"teacher": teacher, "batch_size": batch_size, "progress": advance}
        records = write_responses(generator, encoder, source, found, output, settings, overwrite=overwrite, **options)
    texts = [record["response"] if "response" in record else record["messages"][-1]["content"] for record in records]
    cut = sum(not record["finished"] for record in records)
    empty = sum(not text.strip() for text in texts)
    console.print(f"wrote {len(records):,} responses to {output}", soft_wrap=True, highlight=False)
    if cut or empty:
        console.print(f"{cut:,} were cut off at max_new_tokens={max_new_tokens}, {empty:,} are empty", soft_wrap=True)
