"""Clusters of records by meaning, so that a subset covers all of them: sentence embeddings and k-means.

The recipe of arXiv 2402.10430: embed "Instruction: … Response: …" with all-MiniLM-L6-v2, then k-means with 1000
clusters for Alpaca (52 thousand records) and 300 for Dolly (15 thousand). Needs the `cluster` extra.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from lightning_itk.files import atomic_write

DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
MINI_BATCH_ABOVE = 100_000
"""From this many embeddings on, k-means goes through mini-batches: full k-means takes samples x clusters each pass."""


def cluster_text(instruction: str, response: str, context: str = "") -> str:
    """The text that the paper embeds for one record."""
    asked = f"{instruction} {context}" if context else instruction
    return f"Instruction: {asked} Response: {response}"


def embed(
    texts: Sequence[str],
    model: str = DEFAULT_EMBEDDER,
    *,
    batch_size: int = 64,
    device: str | None = None,
    progress: bool = False,
) -> NDArray[np.float32]:
    """Embed texts with a sentence-transformers model.

    Args:
        texts: one per record; what is longer than the model reads (256 tokens for MiniLM) is cut.
        model: a folder or a name on the hub.
        batch_size: texts at once.
        device: where to run; None = a GPU if there is one.
        progress: show a progress bar.

    Returns:
        Embeddings [texts, dimension], float32.

    Raises:
        ImportError: the `cluster` extra is not installed.
        ValueError: the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ImportError("embedding needs sentence-transformers: pip install 'lightning-itk[cluster]'") from None
    try:
        encoder = SentenceTransformer(model, device=device)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the embedder {model}: {str(error).splitlines()[0]}") from error
    # sentence-transformers sorts by length itself, so short texts are not padded to the longest.
    vectors = encoder.encode(list(texts), batch_size=batch_size, show_progress_bar=progress, convert_to_numpy=True)
    return np.asarray(vectors, np.float32).reshape(len(texts), -1)


def kmeans(embeddings: ArrayLike, k: int, seed: int = 42) -> NDArray[np.int32]:
    """Cluster embeddings by k-means, as the paper does (scikit-learn; mini-batches above 100,000 rows).

    Args:
        embeddings: [samples, dimension].
        k: how many clusters; from the number of samples on, each distinct embedding is a cluster of its own.
        seed: of the initialisation.

    Returns:
        The cluster of each sample [samples], from 0 on, int32.

    Raises:
        ImportError: the `cluster` extra is not installed.
        ValueError: k below 1, or embeddings that are not [samples, dimension] and finite.
    """
    try:
        from sklearn.cluster import KMeans, MiniBatchKMeans
    except ImportError:
        raise ImportError("clustering needs scikit-learn: pip install 'lightning-itk[cluster]'") from None
    vectors = np.asarray(embeddings, np.float32)
    if k < 1:
        raise ValueError(f"clusters must be at least 1, found {k}")
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError(f"embeddings must be finite and [samples, dimension], found shape {vectors.shape}")
    if k >= len(vectors):  # an error in scikit-learn
        return np.unique(vectors, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int32)
    if len(vectors) > MINI_BATCH_ABOVE:
        # The batches are large enough to meet every cluster in each of them.
        model: Any = MiniBatchKMeans(k, random_state=seed, n_init="auto", batch_size=max(4096, 4 * k))
    else:
        model = KMeans(k, random_state=seed, n_init="auto")
    return np.asarray(model.fit_predict(vectors), np.int32)


def write_clusters(path: str | Path, record: ArrayLike, label: ArrayLike, fingerprint: str) -> None:
    """Write the clusters file that `data.subset.clusters` reads, complete or not at all.

    Args:
        path: Parquet file with the columns record and cluster, and the fingerprint under the metadata key `itk`.
        record: record numbers [n].
        label: the cluster of each record [n].
        fingerprint: of the records.

    Raises:
        ValueError: records and clusters of unequal number.
    """
    numbers, labels = np.asarray(record, np.int64), np.asarray(label)
    if numbers.ndim != 1 or numbers.shape != labels.shape:
        raise ValueError(f"one cluster per record is needed, found shapes {numbers.shape} and {labels.shape}")
    table = pa.table({"record": numbers, "cluster": labels})
    noted = json.dumps({"fingerprint": fingerprint, "clusters": len(np.unique(labels))})
    with atomic_write(path) as file:
        pq.write_table(table.replace_schema_metadata({"itk": noted}), file, compression="zstd")
