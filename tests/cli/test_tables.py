"""Tables in narrow terminals: no number is cut, or separated from its unit."""

import io

import pytest
from rich.console import Console

from svdconvert.cli import summaries

COLUMNS = ("run", "loss", "held-out loss", "gsm8k", "weights")
ROWS = [
    ("first", "2.325 -> 1.427", "2.044 -> 2.042", "0.0% (0.0% to 65.8%)", "trained 4.9 MB, lora 4.9 MB"),
    ("a second one", "2.325 -> 1.427", "", "12.5% (3.1% to 65.8%)", "trained 1,234.5 GB"),
]
VALUES = ["2.325", "1.427", "0.0% to 65.8%", "3.1% to 65.8%", "4.9 MB", "1,234.5 GB", "a second one"]


def shown(width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    written = io.StringIO()
    console = Console(file=written, width=width, highlight=False, soft_wrap=True)
    monkeypatch.setattr(summaries, "stdout", console)
    monkeypatch.setattr("svdconvert.cli.terminal.stdout", console)
    summaries.listing(COLUMNS, ROWS)
    return written.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_no_number_is_cut_or_separated_from_its_unit(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(width, monkeypatch)
    assert [value for value in VALUES if value not in text] == []
    assert [line for line in text.splitlines() if len(line.rstrip()) > width] == []
    assert "…" not in text


def test_a_wide_terminal_has_one_line_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(shown(120, monkeypatch).splitlines()) == 1 + len(ROWS)
