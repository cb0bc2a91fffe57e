import json
from pathlib import Path

import numpy as np
import pytest
from commands import RECORDS

from lightning_itk.cli.records import index_records
from lightning_itk.data.sources import Source
from lightning_itk.selection.scores import write_scores


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """data.jsonl with 40 records, and scores of all but two; record i has LP_app 1 - exp(-i / 40)."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + " \n" for r in RECORDS))
    record = np.array([i for i in range(40) if i not in (7, 8)])
    losses = np.stack([np.full(38, 2.0), 2.0 - record / 40])
    tokens = record + 2
    losses[:, 0], tokens[0] = np.nan, 0
    fingerprint = index_records([Source(str(tmp_path / "data.jsonl"))]).fingerprint
    meta = {"fingerprint": fingerprint, "model": "opt-350m"}
    write_scores(tmp_path / "scores.parquet", record, tokens, losses, meta)
    return tmp_path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(5)))
    return tmp_path
