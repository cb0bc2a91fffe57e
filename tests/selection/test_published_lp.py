"""The known figures of the published perplexities (arXiv 2402.10430) come out of the docs' command."""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("ITK_REAL_DATA", ROOT.parent / "shared" / "data")) / "lp"


@pytest.fixture(scope="module")
def published():
    for package in ("scipy", "matplotlib"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("published_lp", ROOT / "benchmarks" / "published_lp.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dolly(published):
    if not DATA.is_dir():
        pytest.skip(f"no published perplexities in {DATA} (set ITK_REAL_DATA)")
    return {one.model: one for one in published.read(DATA)["dolly"]}


def test_page_from_made_up_perplexities(published, tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    random = np.random.default_rng(0)
    for model in ("opt-350m", "opt-1.3b", "llama2-7b"):
        perplexity = np.exp(np.cumsum(random.random((4, 300)), axis=0)[::-1])
        perplexity[:, :20] = 1
        pq.write_table(
            pa.table({f"perplexity_epoch_{epoch}": row for epoch, row in enumerate(perplexity)}),
            tmp_path / f"toy-{model}.parquet",
        )
    monkeypatch.setattr(sys, "argv", ["published_lp.py", "--data", str(tmp_path), "--out", str(tmp_path / "page.md")])
    published.main()
    page = (tmp_path / "page.md").read_text()
    assert "## Toy: 300 samples, 3 models" in page
    assert page.count("20 (6.7 %)") == 3
    assert page.index("| opt-350m") < page.index("| opt-1.3b") < page.index("| llama2-7b")
    assert (tmp_path / "page_toy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.real_data
def test_rank_correlations(published, dolly):
    expected = {
        ("lp", "opt-350m"): (0.748, 0.696),
        ("lp", "opt-1.3b"): (0.833, 0.755),
        ("lp_app", "opt-350m"): (0.785, 0.648),
        ("lp_app", "opt-1.3b"): (0.868, 0.731),
    }
    for (metric, model), figures in expected.items():
        for target, figure in zip(("opt-13b", "llama2-13b"), figures, strict=True):
            ours = published.spearman(
                published.kit_scores(dolly[model], metric), published.kit_scores(dolly[target], metric)
            )
            assert ours == pytest.approx(figure, abs=0.0015), (metric, model, target)
    one_epoch = published.kit_scores(dolly["opt-350m"], "lp_app")
    assert published.spearman(one_epoch, published.kit_scores(dolly["opt-13b"], "lp")) == pytest.approx(0.838, abs=2e-3)


@pytest.mark.real_data
def test_truncated_samples(published, dolly):
    assert {one.truncated.sum() for name, one in dolly.items() if name.startswith("opt")} == {544}
    assert {one.truncated.sum() for name, one in dolly.items() if name.startswith("llama2")} == {765}
    for one in dolly.values():
        assert np.isnan(published.kit_scores(one, "lp")).sum() == one.truncated.sum()
        assert np.isnan(published.kit_scores(one, "lp_app")).sum() == one.truncated.sum()
        # All of them are within the hardest tenth, and they are most of the hardest hundredth.
        tenth = round(0.1 * len(one.truncated))
        assert published.truncated_share(one, "lp", 0.1) * tenth == pytest.approx(one.truncated.sum())
        assert published.truncated_share(one, "lp", 0.01) > 0.8
    with_them = (published.reference_scores(dolly[name], "lp") for name in ("opt-350m", "opt-13b"))
    without = (published.kit_scores(dolly[name], "lp") for name in ("opt-350m", "opt-13b"))
    assert published.bottom_overlap(*with_them, 0.01) == pytest.approx(0.91, abs=0.01)
    assert published.bottom_overlap(*without, 0.01) == pytest.approx(0.30, abs=0.015)


@pytest.mark.real_data
def test_learning_per_epoch_and_oddities(published, dolly):
    for one in dolly.values():
        shares = np.nanmedian(published.learning_shares(one), axis=1)
        assert 0.77 < shares[0] < 0.91
        assert 0.08 < shares[1] < 0.19
        assert 0.01 < shares[2] < 0.04
        odd = published.oddities(one)
        assert odd["P1 > P0"] < 0.002
        assert odd["P3 > P0"] <= 0.0002
        assert odd["both"] <= 7
        assert 0.005 < odd["LP(1) > 1"] < 0.03
    assert published.oddities(dolly["opt-350m"])["P3 > P2"] == pytest.approx(0.2, abs=0.01)
    assert published.oddities(dolly["llama2-13b"])["P3 > P2"] == pytest.approx(0.04, abs=0.01)
