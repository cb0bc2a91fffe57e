"""The benchmarks run in their tiny form, and refuse to time what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import linear_ce  # noqa: E402
import linear_kl  # noqa: E402
import measure  # noqa: E402
import memory  # noqa: E402
import providers  # noqa: E402
import run  # noqa: E402
from settings import Settings  # noqa: E402

SUBJECTS = list(run.SUBJECTS)
STATUSES = {"ok", "not available", "not installed"}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_subject_in_tiny_form(results, subject):
    from pictures import read

    rows = read(results(subject))
    bad = [(r["provider"], r["status"], r.get("reason")) for r in rows if r["status"] not in STATUSES]
    assert not bad
    ours = [r for r in rows if r["status"] == "ok" and providers.named(r["provider"]).ours]
    assert ours
    for row in rows:
        assert row["subject"].endswith(subject) or row["subject"].startswith(subject)
        assert {"device", "torch", "triton", "commit", "date", "cores", "load_at_start"} <= row.keys()
    timed = [r for r in rows if r["status"] == "ok" and r.get("percent_of_floor")]
    assert all(r["ms_p20"] <= r["ms"] <= r["ms_p80"] and r["kl"] > 0 for r in timed)


def test_keys_and_names_are_unambiguous():
    records = providers.RECORDS
    names = [name for p in records for name in (p.shown, p.shown_on_cpu, p.formerly) if name]
    assert len(names) == len(set(names))
    assert len({p.key for p in records}) == len(records)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_run_depends_on_no_name(results, rename, monkeypatch, tmp_path, subject):
    """Who takes part, what is measured of whom and in which order: the same under other names."""

    def decided(text: str) -> list[tuple]:
        rows = [json.loads(line) for line in text.splitlines()]
        said = ("subject", "provider", "mode", "shape", "dtype", "status", "reason")
        return [({k: row.get(k) for k in said}, list(row), row.get("memory_mib") is None) for row in rows]

    before = results(subject).read_text()
    back = rename()
    monkeypatch.setattr("gc.collect", lambda: None)  # takes longer than the tiny steps
    after = run.main(["--tiny", "--only", subject, "--output", str(tmp_path)]).read_text()
    assert after != back(after)
    assert decided(back(after)) == decided(before)


@pytest.mark.parametrize(("device", "slow"), [("cpu", {"compile"}), ("cuda", {"compile", "chunked"})])
def test_what_compiles_for_minutes_takes_part_where_a_problem_says_so(rename, monkeypatch, device, slow):
    rename()  # whatever it is called
    taking_part = {}
    monkeypatch.setattr(measure, "measure", lambda one, makers, _: taking_part.update({one.compiled: set(makers)}))
    settings = Settings(device=device)
    makers = linear_kl.providers(settings)
    measure.measure_all(lambda shape, *_: SimpleNamespace(compiled=shape), (True, False), makers, settings)
    assert taking_part == {True: set(makers), False: set(makers) - slow}


@pytest.mark.parametrize("subject", [linear_kl, linear_ce])
def test_the_rival_written_by_hand_multiplies_no_ignored_row(subject):
    shape = (400, 8, 8, 500, 0.25) if subject is linear_kl else (400, 8, 500, 0.25)
    problem = subject.problem(subject.Shape(*shape), torch.float32, "cpu")
    makers = subject.providers(Settings(tiny=True))

    def operations(key: str) -> int:
        with FlopCounterMode(display=False) as counter:
            measure.call(makers[key](problem), problem.make(0, False), problem, "forward+backward")()
        return counter.get_total_flops()

    assert operations("eager") == problem.both[0]
    assert operations("eager-all") == problem.both[0] * 400 // problem.kept


@pytest.fixture
def rows_of(monkeypatch):
    """`rows_of(key=make, …)` -> the rows of each, in a tiny problem or in the one given."""

    def measured(problem=None, **makers) -> dict[str, list[dict]]:
        for key in makers:
            monkeypatch.setitem(providers.PROVIDERS, key, providers.Provider(key, key))
        settings = Settings(samples=1, warmup=0, tiny=True)
        problem = problem or linear_kl.problem(linear_kl.TINY[0], torch.float32, "cpu")
        measure.measure(problem, makers, settings)
        return {key: [row for row in settings.rows if row["provider"] == key] for key in makers}

    return measured


def test_a_wrong_implementation_gets_no_number(rows_of):
    right = linear_kl.eager_loss

    def changed(change):
        def build(problem):
            loss = right(problem)
            return lambda x: change(loss(x), x)

        return build

    found = rows_of(
        right=right,
        value=changed(lambda value, _: value * 1.01),
        gradient=changed(lambda value, x: value + 0.01 * (x["student_head"] - x["student_head"].detach()).sum()),
        nan=changed(lambda value, _: value * float("nan")),
    )
    assert [row["mode"] for row in found["right"]] == list(measure.MODES)
    for name in ("value", "gradient", "nan"):
        (row,) = found[name]
        assert row["status"] == "wrong", name
        assert "ms" not in row
    assert found["gradient"][0]["reason"].startswith("gradient_error")


def test_an_error_in_the_last_rows_of_the_full_size_is_seen(rows_of):
    shape = linear_kl.Shape(600, 8, 8, 50)
    problem = linear_kl.problem(shape, torch.float32, "cpu")
    right = linear_kl.eager_loss(problem)

    def loses_rows(x):  # as an index that overflows would
        kept = {**x, "labels": x["labels"].clone()}
        kept["labels"][500:] = -100
        return right(kept)

    row = rows_of(problem, overflow=lambda _: loses_rows)["overflow"][0]
    assert row["status"] == "wrong"
    assert row["reason"].startswith("gradient_error_full")


def test_what_goes_wrong_becomes_a_row(rows_of):
    def missing(_):
        raise ImportError("No module named 'peer'")

    def full(_):
        def loss(_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return loss

    def broken(_):
        raise KeyError("peer")

    found = rows_of(missing=missing, full=full, broken=broken)
    statuses = {name: rows[0]["status"] for name, rows in found.items()}
    assert statuses == {"missing": "not installed", "full": "out of memory", "broken": "failed"}


def test_fewer_samples_of_what_takes_long(monkeypatch):
    now = 0.0
    monkeypatch.setattr(measure.time, "monotonic", lambda: now)

    def samples(seconds: float) -> int:
        nonlocal now
        taken = 0
        for _ in measure.repeated(Settings()):
            taken, now = taken + 1, now + seconds
        return taken

    assert [samples(seconds) for seconds in (0.1, 0.3, 9.0)] == [20, 14, 10]


def test_no_time_left(tmp_path):
    from pictures import read

    rows = read(run.main(["--tiny", "--only", "kl_logits", "--budget", "1e-9", "--output", str(tmp_path)]))
    assert {row["status"] for row in rows} == {"skipped"}


def test_what_a_broken_device_leaves_is_done_by_a_new_process(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(run, "device_works", lambda device: False)
    monkeypatch.setattr(run.subprocess, "run", lambda command, **options: commands.append(command))
    run.main(["--tiny", "--only", "linear_ce", "kl_logits", "limits", "--output", str(tmp_path)])
    (command,) = commands
    assert command[command.index("--only") + 1 :] == ["kl_logits", "limits"]
    assert 1100 < float(command[command.index("--budget") + 1]) < 1200


def test_the_package_is_found_without_being_installed():
    """On a machine that brings its own torch nothing is installed; -S hides what is installed here."""
    code = "import run, importlib.util; print(importlib.util.find_spec('lightning_itk').origin)"
    site = Path(torch.__file__).parents[1]  # on the path it gives its packages, but no editable installs
    environment = os.environ | {"PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{site}"}
    found = subprocess.check_output([sys.executable, "-S", "-c", code], env=environment, cwd="/", text=True)
    assert Path(found.strip()).parents[1] == BENCHMARKS.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_full_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        run.main(["--full"])
    assert "needs a GPU" in capsys.readouterr().err


def test_live_bytes_counts_the_peak():
    megabyte = 2**18  # floats

    def action():
        first = torch.ones(4 * megabyte)
        second = first + 1
        del first
        view = second.view(2, -1)
        return view.sum() + torch.ones(megabyte).sum()

    assert memory.peak_mib(action, "cpu") == pytest.approx(8, abs=0.01)


@pytest.mark.interpret
def test_the_plain_kernel_in_the_interpreter():
    code = """
import torch
import attention_kl as a
from problem import Truth, check
problem = a.problem(a.Shape(1, 18, 2, 2, 8, 16, window=5, documents=2, share=0.5), torch.float32, "cpu")
found = check(a.plain_kernel(problem), problem, Truth.of(problem))
assert found["gradient_error"] < 1e-5 and found["value_error"] < 1e-5, found
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCHMARKS)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "subject", ["accuracy", "linear_kl", "linear_ce", "kl_logits", "attention_kl", "training_step", "whole_step"]
)
def test_subject_in_tiny_form_on_a_gpu(subject):
    import importlib

    settings = Settings(device="cuda", samples=2, warmup=1, tiny=True)
    importlib.import_module(subject).run(settings)
    ours = [r for r in settings.rows if providers.named(r["provider"]).ours]
    assert ours
    assert all(r["status"] == "ok" for r in ours), [(r["provider"], r.get("reason")) for r in ours]
