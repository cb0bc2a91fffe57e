"""Every shipped YAML is parsed by the real parser; a misspelt key fails."""

from pathlib import Path

import pytest

from lightning_itk.cli.fit import InstructionCLI

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


def test_interpolation(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {class_path: lightning_itk.SFTModule, init_args: {student: here}}\n"
        "data: {train: '${model.init_args.student}/train.jsonl'}\n"
    )
    assert ParseOnly.start(["fit", "--config", str(path)]).config.fit.data.train == "here/train.jsonl"
