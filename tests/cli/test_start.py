"""What is answered without importing torch, and by which names the command starts."""

import gc
import subprocess
import sys

import pytest

import lightning_itk as itk
from lightning_itk.cli.main import COMMANDS, STAGES, main


@pytest.mark.process
@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_cost_next_to_nothing(flag):
    code = (
        "import sys, time\n"
        "from lightning_itk.cli.main import main\n"
        f"assert main([{flag!r}]) == 0\n"
        "heavy = {'torch', 'transformers', 'lightning', 'numpy', 'datasets', 'rich'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() < 1, time.process_time()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.process
def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "lightning_itk", "--version"], capture_output=True, text=True)
    assert done.stdout == f"lightning-itk {itk.__version__}\n"


@pytest.mark.process
def test_what_is_imported_is_not_looked_at_again():
    """A process of its own: a tenth of all objects at most is left to the garbage collector."""
    code = (
        "import gc\n"
        "from lightning_itk.cli.main import main\n"
        "assert main(['fit', '--config', 'nowhere.yaml']) == 1\n"
        "kept, frozen = len(gc.get_objects()), gc.get_freeze_count()\n"
        "assert gc.isenabled() and kept < frozen / 10, (kept, frozen)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_objects_of_somebody_elses_process_are_theirs(capsys):
    before = gc.get_freeze_count()
    assert main(["fit", "--config", "nowhere.yaml"]) == 1
    assert gc.isenabled()
    assert gc.get_freeze_count() == before
    assert "nowhere.yaml" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in {**STAGES, **COMMANDS})


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'lightning_itk' has no attribute 'KDModul'"):
        _ = itk.KDModul
