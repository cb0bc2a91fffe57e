"""InstructionModule: a student and its steps. One hook to override: `losses(batch)`."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_itk.batch import (
    Batch,
    count_targets,
    flatten,
    is_packed,
    keep_host_copy,
    left_padded,
    on_device,
    on_host,
    real_tokens,
    response_rows,
)
from lightning_itk.hub import load_tokenizer
from lightning_itk.losses.chunked import Head, check_scratch, linear_token_scores
from lightning_itk.losses.implementation import Impl
from lightning_itk.methods.figures import Figures
from lightning_itk.methods.finite import FiniteGuard, NonFinite
from lightning_itk.methods.normalisation import StepSums, loss_scale, scale_gradients
from lightning_itk.methods.optimizer import fuse
from lightning_itk.methods.resume import ResumePoint
from lightning_itk.methods.rounding import stuck_warning
from lightning_itk.methods.router import RouterLoss
from lightning_itk.methods.schedule import schedule
from lightning_itk.methods.sharding import ShardingModule
from lightning_itk.methods.step import ForwardPass, Term, TokenFigure, on_a_pass, weighted_sum
from lightning_itk.models.checkpoint import plain_hparams
from lightning_itk.models.generation import Generator
from lightning_itk.models.hidden import HiddenStates, base_causal_lm, check_head, check_packing, hidden_states
from lightning_itk.models.loading import DType, LoRA, check_student_kwargs, load_causal_lm, make_trainable
from lightning_itk.models.sharded_loading import deferred_loading, is_deferred
from lightning_itk.models.storage import use_whole_checkpoints
from lightning_itk.trainer import datamodule, replica


class InstructionModule(ShardingModule):
    """Train a causal language model on instruction data; the base of SFTModule, KDModule and DAEModule.

    A subclass implements `losses(batch)`; its batch is a `ForwardPass`, so all that it calls shares one run of the
    models. The gradient of an optimizer step is that of the weighted sum of all terms
    over all its micro-batches and ranks, divided by the number of response tokens in them.

    Args:
        student: Folder or hub name that AutoModelForCausalLM reads, or a .gguf file (in Python also a loaded model).
        student_kwargs: More arguments for the student's from_pretrained: revision, gguf_file, ...
        dtype: Precision of the student's weights. float32 keeps small updates that bfloat16 would round away.
        attn_implementation: sdpa, eager, flash_attention_2, ...; null lets transformers choose.
        lora: Train low-rank adapters instead of all weights; null trains everything.
        gradient_checkpointing: Recompute activations in backward to save memory.
        compile: Compile the student's decoder with torch.compile.
        optimizer: Builder that takes the trainable parameters. torch's Adam and AdamW step fused unless told otherwise
            (fused: false, or foreach).
        lr_scheduler: A schedule name of transformers (cosine, linear, constant_with_warmup, ...) or a builder that
            takes the optimizer; null keeps the learning rate constant. Stepped once per optimizer step;
            ReduceLROnPlateau once per epoch, by its monitor or else val/loss.
        warmup: Share of all steps (below 1) or number of steps (1 and more) for a named schedule's warm-up.
        max_new_tokens: Longest answer in the predict loop.
        nonfinite: A step whose loss or gradient is not finite: stop = an error that says where, before the weights are
            touched; skip = leave it out and count it as train/skipped_steps.
        router_weight: Of a mixture of experts: weight of the load-balancing loss, logged as `router`. null = the
            configuration's router_aux_loss_coef if its output_router_logits is true, else 0 = off.
        impl: Loss implementation: auto takes Triton on a GPU that supports it and torch elsewhere.
        max_scratch_bytes: Bound on the logits that a token loss holds at a time and what it makes of them; null = 2 GiB
            in Triton, 1.5 GiB (on a CPU 200 MiB) in torch. Less memory means more and smaller steps through the tokens.
        trust_remote_code: Run code that comes with the model.
        sharded_loading: Read weights when the strategy is known, under FSDP2 only the rows of each rank; until then
            the models have none. null = in lightning-itk where the strategy is ModelParallelStrategy.
    """

    def __init__(
        self,
        student: str | PreTrainedModel,
        *,
        student_kwargs: dict[str, Any] | None = None,
        dtype: DType = "float32",
        attn_implementation: str | None = None,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-5),
        lr_scheduler: LRSchedulerCallable | str | None = "cosine",
        warmup: float = 0.03,
        max_new_tokens: int = 256,
        nonfinite: NonFinite = "stop",
        router_weight: float | None = None,
        impl: Impl = "auto",
        max_scratch_bytes: int | None = None,
        trust_remote_code: bool = False,
        sharded_loading: bool | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="sharded_loading")
        if warmup < 0:
            raise ValueError(f"warmup must not be negative, got {warmup}")
        check_scratch(max_scratch_bytes)
        self.optimizer, self.lr_scheduler, self.warmup = optimizer, lr_scheduler, warmup
        self.max_new_tokens = max_new_tokens
        self.impl: Impl = impl
        self.max_scratch_bytes = max_scratch_bytes
        self._trust_remote_code, self._sharded_loading = trust_remote_code, sharded_loading
        self._student_kwargs = check_student_kwargs(student_kwargs)
        self.student_name = student if isinstance(student, str) else str(student.config.name_or_path)
        if isinstance(student, str):
            with deferred_loading(sharded_loading):
                student = load_causal_lm(
                    student,
                    dtype=dtype,
                    attn_implementation=attn_implementation,
                    trust_remote_code=trust_remote_code,
                    model_kwargs=student_kwargs,
                )
        if not is_deferred(student):
            check_head(student)
        self._router = RouterLoss(student, router_weight)
        model = make_trainable(student, lora, gradient_checkpointing=gradient_checkpointing, compile=compile)
        self.student = model.train()  # from_pretrained leaves a model in eval mode
        self._sums, self._guard, self._resume = StepSums(), FiniteGuard(nonfinite), ResumePoint()
        self._figures = Figures()
        self._loss_scale: float | None = None
        self._packing_checked = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for hook in {"losses", "evaluate", "evaluate_tokens"} & vars(cls).keys():
            setattr(cls, hook, on_a_pass(vars(cls)[hook]))

    # What subclasses use and override

    def losses(self, batch: Batch) -> dict[str, Term]:
        """Named terms of the loss of one micro-batch. The names must be the same for every batch and rank."""
        raise NotImplementedError(f"{type(self).__name__} must implement losses(batch)")

    def evaluate(self, batch: Batch) -> dict[str, Term]:
        """Named figures beside the loss terms, for validation and test: the student's own loss and accuracy."""
        hidden, head, targets = self.response_states(batch)
        scores = linear_token_scores(hidden, head, targets, max_scratch_bytes=self.max_scratch_bytes)
        return {"response_loss": Term(scores.nll.sum()), "token_accuracy": Term((scores.top1 == targets).sum())}

    def evaluate_tokens(self, batch: Batch) -> dict[str, TokenFigure]:
        """Named figures of every response token, for `RecordResults`; `response_loss` covers all of them."""
        hidden, head, targets = self.response_states(batch)
        samples = batch["sample_ids"].flatten()[self.forward_pass(batch).rows.places]
        scores = linear_token_scores(hidden, head, targets, max_scratch_bytes=self.max_scratch_bytes)
        figures = {"response_loss": scores.nll, "token_accuracy": scores.top1 == targets}
        return {name: TokenFigure(samples, values) for name, values in figures.items()}

    def models(self) -> Iterable[torch.nn.Module]:
        """Every language model of this module: what FSDP2 shards."""
        yield self.student

    def run_models(self, batch: Batch) -> ForwardPass:
        """Run what a step needs of the models; a method with more models than the student runs them here."""
        rows = response_rows(batch)  # first: where it waits for the device, that has little to do yet
        return ForwardPass(batch, rows, self.run_student(batch))

    def run_student(self, batch: Batch) -> HiddenStates:
        """One forward pass of the student."""
        return hidden_states(self.student, batch, routers=self._router.weight > 0)

    def forward_pass(self, batch: Batch) -> ForwardPass:
        """`run_models` in the layout that the student can run; a pass is handed back as it is."""
        return batch if isinstance(batch, ForwardPass) else self.run_models(self.lay_out(batch))

    def student_states(self, batch: Batch) -> HiddenStates:
        """The student's hidden states [B, S, H] and its head."""
        return self.forward_pass(batch).student

    def response_states(self, batch: Batch) -> tuple[Float[Tensor, "N H"], Head, Tensor]:
        """The student's hidden states where something is predicted [N, H], its head, and the targets [N]."""
        run = self.forward_pass(batch)
        return run.student.states.flatten(0, 1)[run.rows.places], run.student.head, run.rows.targets

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        loading: dict[str, Any] = {"trust_remote_code": self._trust_remote_code, "model_kwargs": self._student_kwargs}
        return load_tokenizer(self.student_name, **loading)

    # Steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if not self._sums.begun:
            self._resume.begin_window()
        batch = cast(Batch, self.forward_pass(batch))
        terms, targets = self._router.add_to(self.losses(batch), batch), count_targets(batch)
        total = weighted_sum(terms)
        sums: dict[str, Tensor | int] = {"targets": targets, "tokens": real_tokens(batch).sum()}
        sums["slots"] = batch["input_ids"].numel()
        for name, term in {**terms, "loss": Term(total)}.items():
            sums[f"train/{name}"] = term.total
            sums[f"elements/{name}"] = targets if term.elements is None else term.elements
        self._sums.add(sums | self._router.sums(batch), total.device)
        self._guard.add(batch, total)
        if self._loss_scale is None:
            self._loss_scale = loss_scale(self.parameters(), targets, self.trainer.strategy)
        return total * self._loss_scale

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        return self._evaluation_step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> Batch:
        return self._evaluation_step(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[tuple[int, str]]:
        """The student's greedy answers to prompts: (sample id, text), padding left out."""
        data = datamodule(self.trainer)
        generator = Generator(
            base_causal_lm(self.student),
            data.tokenizer or self.tokenizer,
            stops=data.encoder.stop_tokens() if data.encoder else (),
            max_new_tokens=self.max_new_tokens,
        )
        answers = generator.complete(*left_padded(batch))
        samples = batch["sample_ids"].amax(1).tolist()
        return [(sample, answer.text) for sample, answer in zip(samples, answers, strict=True) if sample >= 0]

    def _evaluation_step(self, batch: Batch, stage: str) -> Batch:
        batch = cast(Batch, self.forward_pass(batch))
        terms, targets = self._router.add_to(self.losses(batch), batch), count_targets(batch)
        loss, own = Term(weighted_sum(terms)), self.evaluate(batch)
        if twice := own.keys() & {*terms, "loss"}:
            raise ValueError(f"{', '.join(sorted(twice))}: a term of the loss and a figure of evaluate need two names")
        self._figures.add(stage, {**terms, "loss": loss, **own}, targets)
        return batch  # callbacks see what the models made of it

    def lay_out(self, batch: Batch) -> Batch:
        """The layout this student can run: flash kernels want packed samples in a single row."""
        if is_packed(batch):
            if not self._packing_checked:
                check_packing(self.student)
                self._packing_checked = True
            implementation = base_causal_lm(self.student).config._attn_implementation or ""
            if "flash" in implementation:
                return on_device(flatten(on_host(batch)), batch["input_ids"].device)
        return batch

    # Hooks

    def _set_hparams(self, hp: Any) -> None:
        # Before Lightning copies them: no models, nothing that a weights_only checkpoint cannot hold.
        super()._set_hparams(plain_hparams(hp))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        arrived = super().transfer_batch_to_device(batch, device, dataloader_idx)
        ours = isinstance(batch, dict) and "input_ids" in batch  # a subclass may train on anything
        return keep_host_copy(cast(Batch, arrived), cast(Batch, batch)) if ours else arrived

    def setup(self, stage: str) -> None:
        use_whole_checkpoints(self.trainer.strategy)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if "deepspeed" in type(self.trainer.strategy).__name__.lower():
            raise ValueError(
                "DeepSpeed hides the gradients that exact token normalisation has to scale; "
                "use strategy: ddp, or ModelParallelStrategy (FSDP2)"
            )
        largest = datamodule(self.trainer).max_token_id
        embeddings = base_causal_lm(self.student).get_input_embeddings()
        assert isinstance(embeddings.weight, Tensor)
        rows = embeddings.weight.shape[0]
        if largest >= rows:
            raise ValueError(
                f"the data holds token id {largest} but {self.student_name!r} has only {rows} embeddings: "
                "tokenizer and student do not belong together"
            )

    def on_train_start(self) -> None:
        self._resume.restore(self.trainer)
        self._figures.begin()
        if warning := stuck_warning(self.trainer.optimizers[0].param_groups):
            rank_zero_warn(warning)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def closure() -> Any:
            loss = optimizer_closure()
            sums = self._sums.reduced(self.trainer.strategy)
            # The loss whose gradient the optimizer sees, for those that search along a line (LBFGS).
            return loss if loss is None or not sums else sums["train/loss"] / sums["targets"].clamp_min(1)

        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        # Lightning does it between the next forward pass and its backward: beside all activations.
        self.optimizer_zero_grad(epoch, batch_idx, self.trainer.optimizers[0])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        sums = self._sums.reduced(self.trainer.strategy)
        if not sums:
            return  # under manual optimization: a step for a loss that is not ours
        # Lightning divided each loss by the accumulation, DDP and FSDP averaged over the replicas; ranks that share
        # a batch (tensor parallel) were counted once each.
        replicas = replica(self.trainer).total
        count = sums["targets"].clamp_min(1) * replicas / self.trainer.world_size
        assert self._loss_scale is not None
        factor = self.trainer.accumulate_grad_batches * replicas / (self._loss_scale * count)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        scale_gradients(parameters, factor)
        self._router.end_step(sums)
        norm = self._guard.norm(self.trainer, parameters, sums)
        step, every = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == 0 or (step + 1) % every == 0:
            self._guard.check(self.trainer)
            self.log("train/grad_norm", norm)
            if self._guard.mode == "skip":
                self.log("train/skipped_steps", float(self._guard.skipped))
            self._figures.log_step(self, optimizer, sums | self._router.figures())

    def on_validation_epoch_end(self) -> None:
        self._figures.log_evaluation(self)

    def on_test_epoch_end(self) -> None:
        self._figures.log_evaluation(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._guard.check(self.trainer)
        self._resume.save(self.trainer, checkpoint, self._sums.begun)
        checkpoint |= {"skipped_steps": self._guard.skipped, "loss_scale": self._loss_scale}
        checkpoint["router_load"] = self._router.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._resume.load(self._trainer, checkpoint)
        self._guard.skipped = checkpoint.get("skipped_steps", 0)
        self._loss_scale = checkpoint.get("loss_scale")
        self._router.restore(checkpoint.get("router_load"))

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        fuse(optimizer)
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": schedule(self.lr_scheduler, optimizer, self.trainer, self.warmup),
        }
