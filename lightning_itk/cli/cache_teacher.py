"""`cache-teacher`: run the teachers of a configuration once over its data, for students to learn from without them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.console import Console

from lightning_itk.attention.capture import layer_map
from lightning_itk.cached.manifest import Manifest, Mode, check_folder, is_cached_teacher
from lightning_itk.cli.configured import ConfiguredCLI, loading_of_student, plain
from lightning_itk.cli.fit import TrainingBar
from lightning_itk.data.single_pass import SinglePass
from lightning_itk.hub import load_config, load_tokenizer
from lightning_itk.losses.divergence import Divergence
from lightning_itk.methods.attention_maps import AttentionLoss
from lightning_itk.methods.teacher import Teacher
from lightning_itk.methods.teacher_run import TeacherRun
from lightning_itk.models.loading import load_causal_lm
from lightning_itk.models.pruning import original_layers
from lightning_itk.models.sharded_loading import deferred_loading


class TeacherCLI(ConfiguredCLI):
    """Its model is read, not made, and its Trainer gets no callbacks."""

    description = "Run the teachers of a configuration of fit once, and write a folder that takes their place."
    options = (
        ("output", str | None, None, "Folder to write; with several teachers a folder of theirs, by name."),
        (
            "mode",
            Mode,
            "states",
            "states = the whole distribution; topk = the k likeliest tokens, and the rest as one.",
        ),
        ("k", int, 128, "Of mode topk."),
        ("attention", bool, False, "Store queries and keys for the configuration's attention term as well."),
        ("only", str | None, None, "Run only this one of DAE's teachers."),
        ("overwrite", bool, False, "Replace an earlier cached teacher of other settings; nothing else ever."),
    )

    def instantiate_classes(self) -> None:
        config = self.config[self.subcommand].clone()
        self.settings: Namespace = config.pop("model")
        self.config_init = Namespace(fit=self._parser(self.subcommand).instantiate_classes(config))
        self.datamodule = self._get(self.config_init, "data")
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        given = dict(self._get(self.config_init, "trainer", default={}))
        whole = {"limit_predict_batches": None, "fast_dev_run": False, "inference_mode": False}
        bar = [] if given.get("enable_progress_bar") is False else [TrainingBar()]
        plain = {"callbacks": bar, "logger": False, "enable_checkpointing": False}
        return self.trainer_class(**{**given, **whole, **plain})


def cache_teacher(args: Sequence[str]) -> None:
    """Run the teachers that a configuration of `fit` names, one after the other.

    Args:
        args: those of `fit`, and output, mode, k, attention, only, overwrite.

    Raises:
        ValueError: what the user got wrong, in one line.
    """
    cli = TeacherCLI.start(["fit", *args])
    chosen, init = cli.config.fit, cli.settings.init_args
    if chosen.output is None:
        raise ValueError("output is null, expected a folder to write (--output)")
    teachers, several = _teachers(cli.settings)
    default = init.get("default_teacher") or next(iter(teachers))
    if chosen.only is not None and chosen.only not in teachers:
        raise ValueError(f"only is {chosen.only!r}, expected one of {', '.join(map(repr, teachers))}")
    folders = {name: Path(chosen.output, name) if several else Path(chosen.output) for name in teachers}
    for name in [name for name in teachers if chosen.only in (None, name)]:
        check_folder(folders[name])
        wanted = _owner(name, default) if several else None
        _run(cli, teachers[name], folders[name], wanted)


def _teachers(model: Namespace) -> tuple[dict[str, str], bool]:
    """The teachers that a model's settings name, and whether there may be several."""
    init = model.get("init_args") or Namespace()
    one, several = init.get("teacher"), init.get("teachers")
    if not isinstance(one, str) and not several:
        raise ValueError(f"{model.class_path} has no teacher by name: cache-teacher runs those of KD and DAE")
    teachers = {"": one} if isinstance(one, str) else dict(several)
    for name, teacher in teachers.items():
        if not isinstance(teacher, str):
            raise ValueError(f"teacher {name!r} is a {type(teacher).__name__}, expected a folder or hub name")
        if "/" in name or name.startswith("."):
            raise ValueError(f"teacher {name!r}: its name cannot be that of a folder")
        if is_cached_teacher(teacher):
            raise ValueError(f"{teacher}: is a cached teacher already (leave it out with --only)")
    return teachers, not isinstance(one, str)


def _owner(name: str, default: str) -> Any:
    return lambda tag: (tag or default) == name


def _run(cli: TeacherCLI, name: str, folder: Path, wanted: Any) -> None:
    chosen, init, console = cli.config.fit, cli.settings.init_args, Console()
    trust = bool(init.get("trust_remote_code"))
    tokenizer = load_tokenizer(init.student, **loading_of_student(init))
    loading: dict[str, Any] = {"trust_remote_code": trust, "offload": bool(init.get("teacher_offload"))}
    loading["model_kwargs"] = plain(init.get("teacher_kwargs"))
    with deferred_loading(isinstance(cli.trainer.strategy, ModelParallelStrategy)):
        teacher = Teacher(name, dtype=init.get("teacher_dtype") or "auto", **loading)
    teacher.check_tokenizer(tokenizer)
    run = TeacherRun(
        teacher,
        folder,
        mode=chosen.mode,
        k=chosen.k,
        temperature=init.get("temperature") or 1.0,
        layers=_layers(init, teacher) if chosen.attention else (),
        tokenizer=tokenizer,
        overwrite=chosen.overwrite,
    )
    cli.trainer.predict(run, datamodule=SinglePass(cli.datamodule, wanted), return_predictions=False)
    if not cli.trainer.is_global_zero:
        return
    manifest = run.finish()
    size = sum(file.bytes for file in manifest.files)
    what = "is complete and undamaged" if run.complete else "wrote"
    text = f"{manifest.samples:,} samples, {manifest.response_tokens:,} response tokens, {size / 1e6:,.1f} MB"
    console.print(f"{folder} {what}: {text}" if run.complete else f"{what} {folder}: {text}", soft_wrap=True)
    if _attention(init) and not chosen.attention:
        console.print("the attention term needs queries and keys: not stored (--attention true)", soft_wrap=True)
    if run.gap_rows is not None:
        _print_gap(cli, run, manifest, console)


def _attention(init: Namespace) -> AttentionLoss | None:
    given = init.get("attention")
    found = AttentionLoss(**vars(given)) if isinstance(given, Namespace) else given
    return found if found is not None and found.weight else None


def _layers(init: Namespace, teacher: Teacher) -> set[int]:
    """The teacher layers that the student's attention is compared with."""
    loss = _attention(init)
    if loss is None:
        raise ValueError("attention is true, but the configuration has no attention term: set model's attention")
    config = load_config(init.student, **loading_of_student(init))
    original = original_layers(config, teacher.num_layers)
    pairs = layer_map(config.get_text_config().num_hidden_layers, teacher.num_layers, loss.layers, original)
    return set(pairs.values())


def _print_gap(cli: TeacherCLI, run: TeacherRun, manifest: Manifest, console: Console) -> None:
    """What the top k are worth to the student with which training begins, on a sample of the data."""
    init = cli.settings.init_args
    rows, device = run.gap_rows, run.device
    run.teacher.to("cpu")
    assert rows is not None
    student = load_causal_lm(init.student, **loading_of_student(init))
    student.to(device)  # type: ignore[arg-type]
    how = Divergence(init.get("kind") or "forward", init.get("beta") or 0.5, manifest.settings["temperature"])
    with cli.trainer.precision_plugin.forward_context():
        gap = rows.measure(student, run.k, how)
    if gap is None:
        console.print("nothing ran, so the gap of the top k was not measured")
        return
    count = sum(map(len, rows.states))
    console.print(
        f"top {run.k} against all tokens, on {count:,} response tokens of {init.student}: divergence {gap.stored:.4g} "
        f"(exact {gap.exact:.4g}, {gap.stored / gap.exact - 1:+.1%}), error of the gradient {gap.token_gradient:.1%} "
        f"per token, {gap.summed_gradient:.1%} of its sum",
        soft_wrap=True,
        highlight=False,
    )
