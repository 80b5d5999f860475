"""Progress bars."""

import re
from io import StringIO

import pytest
from rich.console import Console

from svdconvert.cli import progress
from svdconvert.config.progress import Progress


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_progress_bar_is_one_line_and_keeps_its_numbers(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = StringIO()
    terminal = Console(file=shown, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(progress, "stderr", terminal)
    name, file = "model.layers.3.self_attn.q_proj.weight", "model-00001-of-00005.safetensors"
    with progress.tensors("decompose") as track:
        track(Progress(name, file, 200_000_000, 600_000_000))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert [line for line in re.split(r"[\r\n]+", plain) if line.strip() and "decompose" not in line] == []
    last = [line for line in re.split(r"[\r\n]", plain) if "decompose" in line][-1]
    assert "200.0/600.0 MB" in last
    assert len(last.rstrip()) <= width
    assert (f"{name} {file}" in last) == (width == 200)
    assert name[:10] in last


def test_without_a_terminal_there_is_no_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = StringIO()
    monkeypatch.setattr(progress, "stderr", Console(file=shown))
    with progress.tensors("decompose") as track:
        track(Progress("a", "b", 1, 2))
    assert shown.getvalue() == ""
