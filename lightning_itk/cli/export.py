"""`export`: a checkpoint as a Hugging Face folder."""

from pathlib import Path

from rich.console import Console

from lightning_itk.data.template import ensure_chat_template, read_template
from lightning_itk.hub import load_tokenizer
from lightning_itk.models.export import MAX_SHARD_SIZE, check_replaceable, open_student, split_weights, write_folder
from lightning_itk.models.loading import DType


def export_checkpoint(
    ckpt: str,
    output: str,
    student: str | None = None,
    tokenizer: str | None = None,
    dtype: DType = "auto",
    max_shard_size: str = MAX_SHARD_SIZE,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Turn a checkpoint of a training run into a Hugging Face folder: weights (adapters merged), tokenizer, template.

    No teacher is loaded, and nothing in the checkpoint is executed. Weights pass through memory one output file at a
    time: a smaller max_shard_size needs less.

    Args:
        ckpt: Checkpoint file of any module of this kit.
        output: Folder to write.
        student: The folder, .gguf file or hub name that training began with; null = what the checkpoint says.
        tokenizer: Folder, .gguf file or hub name of the tokenizer; null = the student's.
        dtype: Precision of the saved weights; auto = as they were trained.
        max_shard_size: Size of a file of weights, such as 5GB; a larger model becomes several files and an index.
        chat_template: The Jinja chat template of the data module, or a file that holds it; null = the tokenizer's,
            else the Alpaca prompt.
        trust_remote_code: Run code that comes with the student.
        overwrite: Replace an earlier export; anything else in the folder is never touched.
    """
    folder = Path(output)
    if folder.exists() and not overwrite:
        raise ValueError(f"{output}: exists already; --overwrite true replaces an earlier export")
    check_replaceable(folder)  # before the models are loaded
    split_weights({}, max_shard_size)
    trained = open_student(ckpt, student, trust_remote_code=trust_remote_code)
    kwargs = None if tokenizer else trained.kwargs
    words = load_tokenizer(tokenizer or trained.name, trust_remote_code=trust_remote_code, model_kwargs=kwargs)
    ensure_chat_template(words, read_template(chat_template))
    if trained.note:
        Console().print(trained.note, soft_wrap=True, highlight=False)
    write_folder(trained.saved, trained.weights, words, output, dtype, max_shard_size)
    Console().print(f"wrote {output} (step {trained.step:,})", soft_wrap=True, highlight=False)
