"""The results file: one Parquet row per held-out record, see `results.RecordResults` for the columns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lightning_itk.files import atomic_write
from lightning_itk.outputs import note_output

_META = b"itk"


def write_results(path: Path, sums: dict[str, dict[int, list[float]]], meta: dict[str, Any]) -> None:
    """Write results, complete or not at all.

    Args:
        path: where; its folder is made if needed.
        sums: by figure and record, the sum over its tokens and their number; `response_loss` has every record.
        meta: what the results belong to; kept in the schema as JSON.
    """
    records = sorted(sums.get("response_loss", {}))
    columns: dict[str, Any] = {
        "record": np.array(records, np.int64),
        "tokens": np.array([sums["response_loss"][record][1] for record in records], np.int32),
    }
    for name in sums:
        pairs = [sums[name].get(record, [np.nan, 1.0]) for record in records]
        columns[name] = np.array([total / count for total, count in pairs], np.float64)
    table = pa.table(columns).replace_schema_metadata({_META: json.dumps(meta)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        pq.write_table(table, file)
    note_output(path)


def read_results(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The columns of a results file, and what they belong to.

    Raises:
        ValueError: no such file, or none that RecordResults wrote.
    """
    try:
        table = pq.read_table(path)
        meta = json.loads((table.schema.metadata or {})[_META])
        columns = {name: table[name].to_numpy() for name in table.column_names}
        columns["record"], columns["tokens"], columns["response_loss"]  # noqa: B018
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, KeyError, ValueError, pa.ArrowException):
        raise ValueError(f"{path}: is no file of results that RecordResults wrote") from None
    return columns, meta
