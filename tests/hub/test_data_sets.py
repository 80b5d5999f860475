"""A data set of the Hub: its bytes are reported while they come, and its rows are those of its files."""

import json
from pathlib import Path

import pytest

from tests.loopback_hub.server import Hub
from tests.visitor import Visitor

pytestmark = pytest.mark.processes
READ = """
from svdconvert.config.progress import tracking
from svdconvert.training.data.rows import read_rows
seen = []
track = lambda progress: seen.append([progress.phase, progress.done, progress.total, progress.unit])
with tracking(track, "train"):
    first = list(read_rows("org/rows", "train"))
fetched = [entry for entry in seen if entry[0] == "fetch"]
seen.clear()
with tracking(track, "train"):
    again = list(read_rows("org/rows", "train[1:3]"))
result = [first, fetched, again, [entry[0] for entry in seen]]
"""


def test_a_data_set_reports_its_bytes_once_and_has_the_rows_of_its_files(
    hub: Hub, alice: Visitor, tmp_path: Path
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    rows = [{"prompt": f"what is {number} ?" + " " * 4000, "response": str(number)} for number in range(60)]
    pieces = {"train-1.jsonl": rows[:20], "train-2.jsonl": rows[20:], "test.jsonl": rows[:1]}
    for name, part in pieces.items():
        (files / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    hub.create("datasets/org/rows", files)
    first, fetched, again, phases = alice.runs(READ)  # type: ignore[misc]
    assert first == rows
    assert again == rows[1:3]
    size = sum((files / name).stat().st_size for name in pieces)
    assert {(total, unit) for _, _, total, unit in fetched} == {(size, "bytes")}
    done = [entry[1] for entry in fetched]
    assert done == sorted(done) and (done[0], done[-1]) == (0, size)
    assert len(set(done)) > len(pieces)
    assert "fetch" not in phases, "what is in the cache is not fetched again"
