"""Which files are journals of svdconvert: others are never emptied."""

from pathlib import Path

import pytest

from svdconvert.output.journal import Journal, is_own_journal


def test_a_journal_is_own_after_every_byte_that_a_kill_may_leave(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, {"command": "merge"}).close()
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        assert is_own_journal(path)


@pytest.mark.parametrize(
    "text", ["precious", "{", '{"checksum": 1}\n', '{"my": "notes"', "\n", "a\nb\n", "\0" * 9]
)
def test_any_other_file_is_foreign_also_without_a_line_break(text: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(text)
    assert is_own_journal(path) == (text == "{")
