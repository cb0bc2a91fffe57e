"""The house rules: who imports whom, how long files are, what an import must not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_itk"


def contributing_table() -> dict[str, set[str]]:
    """The import table of CONTRIBUTING.md: room -> rooms of the package that it may import."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = text.split("<!-- imports -->")[1].split("```")[1]
    rows = (line.partition("->") for line in block.strip().splitlines())
    return {room.strip(): set(allowed.split()) - {"nothing"} for room, _, allowed in rows}


def files() -> list[Path]:
    """The package's own files; the kernels are reached by a link and looked at on their own."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "kernels"]


def room(path: Path) -> str:
    """The folder of a file, or the file itself where it stands at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms of the package that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lightning_itk":
            found |= {alias.name for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module.split(".")[1]} if node.module.startswith("lightning_itk.") else set()
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lightning_itk.")}
    return found


def test_the_import_table_holds():
    table = contributing_table()
    found: dict[str, set[str]] = {}
    for path in files():
        found.setdefault(room(path), set()).update(imports(path) - {room(path)})
    assert {name: found[name] for name in found if not name.startswith("__")} == table


def test_arrows_go_one_way():
    table = contributing_table()

    def reach(name: str, seen: tuple[str, ...] = ()) -> None:
        assert name not in seen, f"import cycle: {' -> '.join([*seen, name])}"
        for other in table.get(name, ()):
            reach(other, (*seen, name))

    for name in table:
        reach(name)


def test_modules_and_data_do_not_know_each_other():
    table = contributing_table()
    assert "data" not in table["methods"]
    assert not table["data"] & {"methods", "models", "attention"}


def test_kernels_are_a_leaf_and_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = PACKAGE / "kernels"
    assert link.is_symlink()
    assert str(link.readlink()) == "../kernels"
    for path in (ROOT / "kernels").glob("*.py"):
        assert not imports(path), path
    assert not list((ROOT / "benchmarks").glob("kernels.py"))
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize("folder", ["lightning_itk", "kernels", "benchmarks"])
def test_files_stay_short(folder):
    lengths = {str(path): len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert not {name: length for name, length in lengths.items() if length > 360}


@pytest.mark.process
def test_importing_the_package_loads_no_kernel_and_uses_no_network():
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise OSError('network at import')\n"
        "socket.socket.connect = refuse\n"
        "import lightning_itk as itk\n"
        "assert dir(itk) and not {'torch', 'transformers', 'lightning', 'numpy'} & sys.modules.keys()\n"
        "assert {name: getattr(itk, name) for name in itk.__all__} and itk.losses.kl_divergence\n"
        "assert not [m for m in sys.modules if m.startswith('lightning_itk.kernels.')]\n"
        "print(sorted(n for n in itk.__all__))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for name in ("SFTModule", "KDModule", "DAEModule", "InstructionModule", "InstructionDataModule", "Teacher"):
        assert name in done.stdout


def test_nothing_is_unpickled():
    """Checkpoints load with weights_only=True; the one unpickler knows nothing but names of plain data."""
    for path in [*files(), *(ROOT / "kernels").glob("*.py")]:
        text = path.read_text()
        assert "import pickle" not in text or path.name == "sharded.py", path
        assert "pickle.load" not in text, path
        assert "weights_only=False" not in text, path
        assert "trust_remote_code=True" not in text, path


def test_the_readme_snippet_runs(tmp_path, monkeypatch, model_folder):
    text = (ROOT / "README.md").read_text()
    blocks = text.split("<!-- subclass -->")[1].split("```python\n")[1:3]
    snippet = "\n\n".join(block.split("```")[0] for block in blocks)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_kd.py").write_text(snippet)
    import importlib

    import torch
    from tiny import ragged_samples

    from lightning_itk import batch as b

    mine, batch = importlib.import_module("my_kd"), b.pad(ragged_samples(4), pad_id=0)
    module = mine.EntropyKD(model_folder("granite", 0), teacher=model_folder("granite", 1))  # scales its logits
    terms = module.losses(batch)
    assert set(terms) == {"distillation", "kl", "ce", "entropy"}
    log_q = module.student(**b.model_inputs(batch)).logits[b.next_token_labels(batch) >= 0].log_softmax(-1)
    assert terms["entropy"].total.item() == pytest.approx(-(log_q.exp() * log_q).sum().item(), rel=1e-4)
    sum(term.weight * term.total for term in terms.values()).backward()
    assert torch.isfinite(module.student.lm_head.weight.grad).all()
    other = mine.TotalVariationKD(model_folder("llama", 0), teacher=model_folder("llama", 1))
    assert 0 < other.losses(batch)["distillation"].total < b.count_targets(batch)
