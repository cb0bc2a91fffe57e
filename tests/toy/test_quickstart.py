import json
import math
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_itk.cli.main import main
from lightning_itk.toy.questions import DOMAINS
from lightning_itk.toy.quickstart import answer, quickstart, verdict
from lightning_itk.toy.world import CHAT_TEMPLATE


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """A quickstart with a few steps per stage, and what it printed."""
    output = tmp_path_factory.mktemp("quickstart") / "run"
    printed = StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        assert main(["quickstart", "--output", str(output), "--steps_scale", "0.01"]) == 0
    return output, printed.getvalue()


def test_the_table_has_every_method_on_both_domains(run):
    output, _ = run
    results = json.loads((output / "results.json").read_text())
    assert (results["seed"], results["steps_scale"]) == (0, 0.01)
    rows = results["models"]
    for method in ("untrained", "teacher", "expert", "SFT", "KD on", "KD + attention", "DAE"):
        assert any(method in name for name in rows), method
    for figures in rows.values():
        assert set(figures) == set(DOMAINS)
        for domain in DOMAINS:
            assert math.isfinite(figures[domain]["loss"])
            assert 0 <= figures[domain]["exact_match"] <= 1
    selection = results["selection"]
    assert [name for name in selection["rows"] if "random" in name] == [f"random third {n}" for n in (1, 2, 3)]
    assert "lowest third" in selection["rows"]
    assert selection["verdict"].startswith("Choosing the lowest third of LP")
    text = (output / "results.md").read_text()
    assert all(name in text for name in (*rows, *selection["rows"], selection["verdict"]))


def test_the_exported_student_is_read_by_plain_transformers(run):
    output, _ = run
    model = AutoModelForCausalLM.from_pretrained(output / "student")
    tokenizer = AutoTokenizer.from_pretrained(output / "student")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where is the mug?"}], tokenize=False, add_generation_prompt=True
    )
    alone = answer(model, tokenizer, [prompt], max_new_tokens=4)
    padded = answer(model, tokenizer, [prompt, prompt + "The mug is in aisle"], max_new_tokens=4)
    assert padded[0] == alone[0]
    assert not model.training


def test_it_prints_progress_tables_and_nothing_else(run):
    _, printed = run
    for noise in ("Warning", "Tip:", "GPU available", "Loading weights", "LOCAL_RANK", "does not have many workers"):
        assert noise not in printed
    for words in ("SFT of the teacher", "KD of the student", "exact match", "plain transformers", "Done in"):
        assert words in printed


def test_nothing_temporary_is_left(run):
    output, _ = run
    assert not list(output.glob(".*"))


def test_verdict_says_plainly_what_happened():
    def rows(low, *others):
        thirds = {f"random third {n}": {"exact_match": em, "loss": loss} for n, (em, loss) in enumerate(others, 1)}
        return {"lowest third": {"exact_match": low[0], "loss": low[1]}, **thirds}

    others = ((0.3, 1.0), (0.4, 2.0))
    assert verdict(rows((0.5, 3.0), *others)) == (
        "Choosing the lowest third of LP instead of 2 random ones helped by exact match (50.0% against 30.0% to 40.0%) "
        "and hurt by loss (3.000 against 1.000 to 2.000)."
    )
    assert "hurt by exact match" in verdict(rows((0.2, 0.5), *others))
    assert "helped by loss" in verdict(rows((0.2, 0.5), *others))
    assert verdict(rows((0.3, 2.0), *others)).count("made no difference") == 2


def test_a_scale_that_is_no_number_of_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="steps_scale must be above 0, got 0"):
        quickstart(tmp_path, steps_scale=0)
    assert not list(tmp_path.iterdir())
