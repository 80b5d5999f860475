"""The journal: a killed run is continued, and only by the same command."""

import json
from pathlib import Path

import pytest

from svdconvert.errors import OutputError
from svdconvert.output.journal import Journal

IDENTITY = {"command": "decompose", "rank": 4, "targets": ("attn",)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal with two finished items."""
    journal = Journal(tmp_path / "journal.jsonl", IDENTITY)
    journal.finish("a", {"source": "1"})
    journal.finish("b", {"source": "2", "note": {"rank": 4}})
    journal.close()
    return tmp_path / "journal.jsonl"


def finished(path: Path) -> dict[str, object]:
    journal = Journal(path, IDENTITY)
    journal.close()
    return dict(journal.finished)


def test_what_was_finished_is_known_to_the_next_run(path: Path) -> None:
    assert finished(path) == {"a": {"source": "1"}, "b": {"source": "2", "note": {"rank": 4}}}


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_line_that_a_kill_cut_short_is_forgotten_and_overwritten(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(path, IDENTITY)
    assert journal.finished == {"a": {"source": "1"}}
    journal.finish("c", {"source": "3"})
    journal.close()
    assert finished(path) == {"a": {"source": "1"}, "c": {"source": "3"}}
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("length", [0, 1, 10])
def test_a_journal_without_a_complete_first_line_is_started_again(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    assert finished(path) == {}
    assert json.loads(path.read_text())["line"] == {**IDENTITY, "targets": ["attn"]}


def test_another_run_is_refused_naming_what_differs(path: Path) -> None:
    with pytest.raises(OutputError, match=r"another run: rank was 4 and is 8; .*--overwrite"):
        Journal(path, {**IDENTITY, "rank": 8})
    with pytest.raises(OutputError, match=r"seed was null and is 1"):
        Journal(path, {**IDENTITY, "seed": 1})
    assert finished(path).keys() == {"a", "b"}


def test_discarding_removes_what_was_finished(path: Path) -> None:
    journal = Journal(path, {**IDENTITY, "rank": 8}, discard=True)
    assert journal.finished == {}
    journal.close()
    assert path.read_text().count("\n") == 1


def test_two_runs_cannot_share_a_journal(path: Path) -> None:
    first = Journal(path, IDENTITY)
    for discard in (False, True):
        with pytest.raises(OutputError, match="another run is writing"):
            Journal(path, IDENTITY, discard=discard)
    first.finish("c", {"source": "3"})
    first.close()
    assert finished(path).keys() == {"a", "b", "c"}
