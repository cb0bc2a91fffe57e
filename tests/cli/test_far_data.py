"""Commands on data that one file, or one machine, does not hold."""

import gzip

import fsspec
from commands import select

from lightning_itk import cli


def test_select_reads_a_folder_elsewhere_as_the_one_file_that_was_scored(scored):
    written = (scored / "data.jsonl").read_bytes().splitlines(keepends=True)
    system = fsspec.filesystem("memory")
    system.pipe(
        {"/select/0.jsonl": b"".join(written[:30]), "/select/1.jsonl.gz": gzip.compress(b"".join(written[30:]))}
    )
    found = []
    for data in (scored / "data.jsonl", "memory://select", "memory://select/[01].*"):
        assert cli.main(select(scored, "--data", data, "--fraction", 0.5, "--overwrite", "true")) == 0
        found.append((scored / "out" / "chosen.jsonl").read_bytes())
    assert found[0] == found[1] == found[2]
    system.rm("/select", recursive=True)
