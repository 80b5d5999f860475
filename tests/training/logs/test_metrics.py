"""A resumed run keeps the measurements up to its checkpoint and repeats the others."""

import json
from pathlib import Path

from svdconvert.training.logs.metrics import JsonLinesFile


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write(path: Path, resumed_step: int, *numbers: int) -> None:
    with JsonLinesFile(path, resumed_step) as file:
        for number in numbers:
            file.write({"step": number})


def test_lines_up_to_the_resumed_step_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 0, 1, 2, 3)
    write(path, 2, 3, 4)
    assert steps(path) == [0, 1, 2, 3, 4]


def test_a_run_from_the_beginning_keeps_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 0, 1)
    write(path, 0, 0)
    assert steps(path) == [0]


def test_an_incomplete_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    write(path, 2, 2)
    assert steps(path) == [1, 2]
