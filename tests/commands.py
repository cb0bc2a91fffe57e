"""What the tests of the commands share: records, command lines, and the one line of an error."""

import json
from pathlib import Path

from lightning_itk import cli

RECORDS = [
    {"instruction": f"Frage {i} ä", "context": "", "response": "x" * (1 + i), "kind": "ab"[i % 2]} for i in range(40)
]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def refused(capsys, *args: str) -> str:
    """The one line on stderr of a command that must fail."""
    capsys.readouterr()
    assert cli.main(list(map(str, args))) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("lightning-itk: error: ")
    return line


def select(folder: Path, *more: str) -> list[str]:
    return ["select", "--scores", f"{folder}/scores.parquet", "--data", f"{folder}/data.jsonl",
            "--output", f"{folder}/out/chosen.jsonl", *map(str, more)]  # fmt: skip


def generate(model: str, folder: Path, *more: str) -> list[str]:
    return ["generate", "--model", model, "--prompts", f"{folder}/prompts.jsonl", "--output", f"{folder}/out.jsonl",
            "--max_new_tokens", "4", "--batch_size", "2", "--device", "cpu", *map(str, more)]  # fmt: skip


def responses(path: Path, answers: list[str], rewards: list[float] | None = None, order=None) -> Path:
    rows = [{"prompt": f"p{i}", "response": answer} for i, answer in enumerate(answers)]
    for row, reward in zip(rows, rewards or [], strict=False):
        row["reward"] = reward
    path.write_text("".join(json.dumps(rows[i]) + "\n" for i in order or range(len(rows))))
    return path


def choose(student: str, *more: str, **files: Path) -> list[str]:
    named = [part for name, path in files.items() for part in (f"--candidates.{name}", str(path))]
    return ["choose-teacher", "--student", student, *named, "--device", "cpu", "--resamples", "200", *map(str, more)]
