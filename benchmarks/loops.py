"""The real training loops: Lightning's with the kit's modules, Hugging Face's, TRL's, each as its users start it.

    python benchmarks/loops.py JOB.json RESULT.json     # so whole_step.py runs each, in a process of its own

All get the same models, samples in the same order, optimizer and number of steps.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from job import Example, Job, load, read_examples
from watch import Watch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package beside this folder, installed or not

Loop = Callable[[Job, Watch, Any, Any, list[Example]], float]
"""Trains and returns the first step's loss per response token."""


def lightning(job: Job, watch: Watch, student: Any, teacher: Any, examples: list[Example]) -> float:
    """The kit: its module and batches, Lightning's Trainer."""
    import lightning as L

    from lightning_itk.batch import Sample, pad
    from lightning_itk.methods.kd import KDModule
    from lightning_itk.methods.sft import SFTModule

    class Tokens(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            watch.given.append(batch["attention_mask"].sum())  # the model is given no mask for the padding on the right

    options: Any = {"optimizer": watch.optimizer, "lr_scheduler": None}
    module = SFTModule(student, **options) if teacher is None else KDModule(student, teacher, **options)
    samples = [Sample(e.ids, e.labels(), i, 0) for i, e in enumerate(examples)]
    batches = [pad(samples[i : i + job.batch], pad_id=0) for i in range(0, len(samples), job.batch)]
    trainer = L.Trainer(
        accelerator="gpu" if job.device == "cuda" else "cpu",
        devices=1,
        callbacks=[Tokens()],
        precision=job.precision,  # type: ignore[arg-type]
        max_steps=job.steps,
        accumulate_grad_batches=job.accumulate,
        log_every_n_steps=10**6,  # the first step only, as in the other loops
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return float(trainer.callback_metrics["train/loss"])


def _arguments(job: Job, folder: str) -> dict[str, Any]:
    """What Hugging Face's Trainer and TRL's, which are made of it, are told."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": job.batch,
        "gradient_accumulation_steps": job.accumulate,
        "max_steps": job.steps,
        "max_grad_norm": 0.0,  # nobody clips here
        "lr_scheduler_type": "constant",
        "bf16": job.precision == "bf16-mixed",
        "use_cpu": job.device == "cpu",
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,  # TRL's default is True
        "dataloader_pin_memory": job.device == "cuda",
        "logging_first_step": True,
        "logging_steps": 10**6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _tokenizer(job: Job) -> Any:
    """TRL and the collators ask for one; for random models it knows how to pad and no more."""
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if job.student.get("folder"):
        return AutoTokenizer.from_pretrained(job.student["folder"])
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def _trained(trainer: Any) -> float:
    trainer.train()
    return float(trainer.state.log_history[0]["loss"])


def _rows(examples: list[Example]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": e.ids.tolist(), "labels": e.labels().tolist()} for e in examples])


def hf_trainer(job: Job, watch: Watch, student: Any, teacher: Any, examples: list[Example]) -> float:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(**_arguments(job, folder))
        collate, optimizer = DataCollatorForSeq2Seq(_tokenizer(job)), watch.optimizer(student.parameters())
        return _trained(
            Trainer(
                student,
                arguments,
                data_collator=collate,
                train_dataset=_rows(examples),
                optimizers=(optimizer, None),
            )
        )


def trl_sft(job: Job, watch: Watch, student: Any, teacher: Any, examples: list[Example]) -> float:
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        ready = {"shuffle_dataset": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        return _trained(
            SFTTrainer(
                student,
                SFTConfig(**_arguments(job, folder), **ready),
                train_dataset=_rows(examples),
                processing_class=_tokenizer(job),
                optimizers=(watch.optimizer(student.parameters()), None),
            )
        )


def trl_kd(job: Job, watch: Watch, student: Any, teacher: Any, examples: list[Example]) -> float:
    """TRL's trainer lets the student write the responses; here they are given, all else is its own."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class Given(DistillationTrainer):  # type: ignore[misc]
        def _generate(self, prompts: list[int]) -> tuple[Any, ...]:
            chosen = [examples[i] for i in prompts]
            return (
                [e.ids[: e.start].tolist() for e in chosen],
                [e.ids[e.start :].tolist() for e in chosen],
                None,
                None,
                [],
            )

    with tempfile.TemporaryDirectory() as folder:
        arguments = DistillationConfig(**_arguments(job, folder), shuffle_dataset=False, beta=0.0, temperature=1.0)
        return _trained(
            Given(
                student,
                teacher,
                arguments,
                train_dataset=Dataset.from_dict({"prompt": list(range(len(examples)))}),
                processing_class=_tokenizer(job),
                optimizers=(watch.optimizer(student.parameters()), None),
            )
        )


def reference(job: Job, watch: Watch, student: Any, teacher: Any, examples: list[Example]) -> float:
    """The first step in fp64, sample by sample, from the formula."""
    window = examples[: job.batch * job.accumulate]
    count = sum(len(e.ids) - e.start for e in window)
    student, total = student.double().train(), 0.0
    teacher = teacher if teacher is None else teacher.double().eval()
    for example in window:
        ids = torch.from_numpy(example.ids).to(job.device)[None]
        logp = student(ids).logits[0, example.start - 1 : -1].log_softmax(-1)
        if teacher is None:
            value = -logp.gather(1, ids[0, example.start :, None]).sum()
        else:
            with torch.no_grad():
                target = teacher(ids).logits[0, example.start - 1 : -1].log_softmax(-1)
            value = torch.nn.functional.kl_div(logp, target, reduction="sum", log_target=True)
        (value / count).backward()
        total += value.item()
    watch.write_gradient()
    return total / count


LOOPS: dict[str, Loop] = {
    "lightning": lightning,
    "hf-trainer": hf_trainer,
    "trl-sft": trl_sft,
    "trl-kd": trl_kd,
    "reference": reference,
}


def run(job: Job) -> dict[str, Any]:
    """Train as the job says; what was seen of it."""
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    dtype = torch.bfloat16 if job.precision == "bf16-true" else torch.float32
    student, teacher = load(job.student, job.device, dtype), None
    if job.method == "kd":
        teacher = load(job.teacher, job.device, dtype).eval().requires_grad_(False)
    watch = Watch(job, student)
    loss = LOOPS[job.provider](job, watch, student, teacher, read_examples(job.samples))
    return {"loss": loss, **watch.found()}


if __name__ == "__main__":
    told = Job(**json.loads(Path(sys.argv[1]).read_text()))
    if told.device == "cpu":
        torch.set_num_threads(1)
    Path(sys.argv[2]).write_text(json.dumps(run(told)))
