"""Every shipped YAML is parsed by the real parser; a misspelt key fails."""

from pathlib import Path

import lightning as L
import pytest

from lightning_itk.cli.fit import InstructionCLI, TrainingBar

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


class ParseOnly(InstructionCLI):
    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parses_and_opens_with_its_command(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# lightning-itk fit --config configs/{path.name}")
    config = ParseOnly.start(["fit", "--config", str(path)]).config.fit
    assert config.model.class_path.startswith("lightning_itk.")
    assert config.data.train


def test_the_readme_config_parses(tmp_path):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (tmp_path / "kd.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    config = ParseOnly.start(["fit", "--config", str(tmp_path / "kd.yaml")]).config.fit
    assert config.data.train[1]["teacher"] == "expert"
    assert config.model.init_args.attention.weight == 1.0


def test_one_batch_is_validated_before_training(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {class_path: lightning_itk.SFTModule, init_args: {student: s}}\ndata: {train: a.jsonl}\n")
    assert ParseOnly.start(["fit", "--config", str(path)]).config.fit.trainer.num_sanity_val_steps == 1


def test_interpolation(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {class_path: lightning_itk.SFTModule, init_args: {student: here}}\n"
        "data: {train: '${model.init_args.student}/train.jsonl'}\n"
    )
    assert ParseOnly.start(["fit", "--config", str(path)]).config.fit.data.train == "here/train.jsonl"


@pytest.mark.parametrize(("steps", "epochs", "text"), [(10, -1, "Epoch 1"), (-1, 3, "Epoch 1/2")])
def test_the_bar_counts_epochs_and_batches(steps, epochs, text):
    bar = TrainingBar()
    limits = {"max_steps": steps, "max_epochs": epochs, "accumulate_grad_batches": 4}
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[bar], **limits)
    bar.setup(trainer, L.LightningModule(), "fit")
    assert bar._get_train_description(1).strip() == text  # Lightning's says 1/-2
    for batches, total in ((30, 30), (80, 40 if steps == 10 else 80)):  # Lightning's: 10 batches for 10 steps
        trainer.fit_loop.max_batches = batches
        assert bar.total_train_batches == total
