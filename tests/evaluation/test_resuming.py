"""An evaluation that ends at any moment is continued to the same bytes, and only by the same command."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from svdconvert import EvaluationOptions, Run, SplitOptions, decompose, evaluate, read_evaluations
from svdconvert.errors import SvdConvertError
from svdconvert.evaluation import run as running
from svdconvert.evaluation.answering import Answer, Writer
from tests.evaluation.directories import CPU, answers_in, asked, lively, write_questions
from tests.process import finish, start

BATCHES = 3  # of four rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base: a tiny model; data.jsonl: twelve questions; whole: the undisturbed results."""
    home = tmp_path_factory.mktemp("home")
    lively(home / "base")
    write_questions(home / "data.jsonl", 12)
    asked(home / "base", home / "data.jsonl", home / "whole")
    return home


def files(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "evaluations").iterdir()}


def without_time(text: bytes) -> dict[str, Any]:
    return {name: value for name, value in json.loads(text).items() if name != "seconds"}


def require_same(output: Path, whole: Path) -> None:
    """The answers byte for byte, and the results but for the time that they took."""
    found, expected = files(output), files(whole)
    assert found.keys() == expected.keys() == {"gsm8k.json", "gsm8k.jsonl"}
    assert found["gsm8k.jsonl"] == expected["gsm8k.jsonl"]
    assert without_time(found["gsm8k.json"]) == without_time(expected["gsm8k.json"])


@pytest.fixture
def interrupted(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of which two of three batches are there."""
    real = Writer.answers
    left = iter(range(BATCHES - 1))

    def answers(self: Writer, rows: Any) -> list[Answer]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(self, rows)

    monkeypatch.setattr(Writer, "answers", answers)
    with pytest.raises(KeyboardInterrupt):
        asked(home / "base", home / "data.jsonl", tmp_path / "out")
    monkeypatch.undo()
    assert files(tmp_path / "out").keys() == {"gsm8k.partial.jsonl"}
    return tmp_path / "out"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that are answered from now on."""
    sizes: list[int] = []
    real = Writer.answers

    def answers(self: Writer, rows: Any) -> list[Answer]:
        sizes.append(len(rows))
        return real(self, rows)

    monkeypatch.setattr(Writer, "answers", answers)
    return sizes


def test_an_interrupted_run_is_continued_to_the_same_bytes(
    interrupted: Path, home: Path, counted: list[int]
) -> None:
    asked(home / "base", home / "data.jsonl", interrupted)
    assert counted == [4], "only the missing batch is answered"
    require_same(interrupted, home / "whole")


def test_a_file_that_is_torn_at_any_byte_is_continued(
    interrupted: Path, home: Path, counted: list[int]
) -> None:
    path = interrupted / "evaluations" / "gsm8k.partial.jsonl"
    whole = path.read_bytes()
    ends = [number for number, line in enumerate(whole.splitlines(keepends=True)) if b'"batch ' in line]
    lines = whole.splitlines(keepends=True)
    second = sum(map(len, lines[: ends[0] + 1]))
    for cut, missing in ((len(whole) - 1, 2), (second + 5, 2), (second - 1, 3), (len(lines[0]) - 3, 3)):
        path.write_bytes(whole[:cut])
        counted.clear()
        asked(home / "base", home / "data.jsonl", interrupted)
        assert len(counted) == missing
        require_same(interrupted, home / "whole")
        for name in ("gsm8k.json", "gsm8k.jsonl"):
            (interrupted / "evaluations" / name).unlink()


def test_a_run_that_ended_between_its_last_steps_only_finishes(
    home: Path, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the grades, between the two files, and before the partial file is removed."""
    for place in ("grade_all", "_result"):
        with monkeypatch.context() as patch:
            patch.setattr(running, place, _stop)
            with pytest.raises(KeyboardInterrupt):
                asked(home / "base", home / "data.jsonl", tmp_path / place)
        counted.clear()
        asked(home / "base", home / "data.jsonl", tmp_path / place)
        assert counted == []
        require_same(tmp_path / place, home / "whole")


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


CHANGES = {
    "options.batch_size was 4 and is 3": {"batch_size": 3},
    "options.max_new_tokens was 12 and is 5": {"max_new_tokens": 5},
    'options.dtype was "float32" and is "bfloat16"': {"dtype": "bfloat16"},
    "data.limit was null and is 5": {"limit": 5},
    "options.threads was 1 and is 2": {"run": Run(device="cpu", threads=2)},
}


@pytest.mark.parametrize("words", CHANGES)
def test_another_run_is_refused_by_name_unless_it_begins_anew(
    words: str, interrupted: Path, home: Path
) -> None:
    given: dict[str, Any] = CHANGES[words]
    whole = asked(home / "base", home / "data.jsonl", interrupted.with_name("complete"))
    for place in (interrupted, interrupted.with_name("complete")):
        before = files(place)
        with pytest.raises(SvdConvertError, match="left by another run") as error:
            asked(home / "base", home / "data.jsonl", place, **given)
        assert words in str(error.value)
        assert files(place) == before
        run = given.get("run", CPU)
        anew = Run(device="cpu", threads=run.threads, overwrite=True)
        result = asked(home / "base", home / "data.jsonl", place, **{**given, "run": anew})
        assert result.options != whole.options or result.data != whole.data
        assert files(place).keys() == {"gsm8k.json", "gsm8k.jsonl"}


def test_another_model_in_the_same_place_is_refused(interrupted: Path, home: Path, tmp_path: Path) -> None:
    decompose(home / "base", tmp_path / "pissa", SplitOptions(rank=2), CPU)
    with pytest.raises(SvdConvertError, match=r"model\.fingerprint was"):
        asked(tmp_path / "pissa", home / "data.jsonl", interrupted)


def test_the_number_of_threads_is_that_of_the_unfinished_run(interrupted: Path, home: Path) -> None:
    result = asked(home / "base", home / "data.jsonl", interrupted, run=Run(device="cpu"))
    assert result.options["threads"] == 1
    require_same(interrupted, home / "whole")


def test_a_result_that_is_there_is_returned_without_asking(home: Path, counted: list[int]) -> None:
    said: list[str] = []
    run = Run(device="cpu", threads=1, notify=said.append)
    before = files(home / "whole")
    result = asked(home / "base", home / "data.jsonl", home / "whole", run=run)
    assert (counted, files(home / "whole")) == ([], before)
    assert [result] == read_evaluations(home / "whole")
    assert "`overwrite`" in said[0]


def test_files_of_the_user_are_never_replaced(home: Path, tmp_path: Path) -> None:
    anew = Run(device="cpu", threads=1, overwrite=True)
    for name, text in (
        ("gsm8k.json", "mine"),
        ("gsm8k.jsonl", "mine"),
        ("gsm8k.partial.jsonl", '{"a": 1}\n'),
    ):
        folder = tmp_path / name / "evaluations"
        folder.mkdir(parents=True)
        (folder / name).write_text(text)
        with pytest.raises(SvdConvertError, match=name):
            asked(home / "base", home / "data.jsonl", tmp_path / name, run=anew)
        assert (folder / name).read_text() == text


def test_grading_again_needs_no_model(home: Path, tmp_path: Path) -> None:
    asked(home / "base", home / "data.jsonl", tmp_path / "out")
    file = tmp_path / "out" / "evaluations" / "gsm8k.jsonl"
    lines = answers_in(tmp_path / "out")
    lines[3]["answer"] = f"The answer is: {lines[3]['gold']}"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "nothing").mkdir()
    before = read_evaluations(tmp_path / "out")[0]
    grading = EvaluationOptions(regrade=True)
    (after,) = evaluate(tmp_path / "nothing", ["gsm8k"], grading, CPU, output=tmp_path / "out")
    assert after.grades["strict"].correct == before.grades["strict"].correct + 1
    assert after.grades["paper"].correct == before.grades["paper"].correct + 1
    assert answers_in(tmp_path / "out")[3]["strict"]["correct"] is True
    assert (after.options, after.model, after.seconds) == (before.options, before.model, before.seconds)
    with pytest.raises(SvdConvertError, match="nothing to grade"):
        evaluate(tmp_path / "nothing", ["gsm8k"], grading, CPU, output=tmp_path / "other")


def complete_batches(folder: Path) -> int:
    paths = folder.glob("gsm8k.partial*.jsonl")
    return sum(path.read_bytes().count(b'{"item": "batch ') for path in paths)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("many")
    lively(home / "base")
    write_questions(home / "data.jsonl", 80)
    yield home


def command(home: Path, output: Path) -> list[object]:
    options = ["--data", home / "data.jsonl", "--batch-size", 2, "--max-new-tokens", 12, "--device", "cpu"]
    return ["eval", home / "base", "--tasks", "gsm8k", *options, "-o", output]


@pytest.mark.processes
@pytest.mark.slow
def test_a_killed_program_loses_one_batch_at_most(many: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for goal in (3, 12):
        process = start(*command(many, out))
        while process.poll() is None and complete_batches(out / "evaluations") < goal:
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        after = complete_batches(out / "evaluations")
        assert goal <= after < 40, "it was killed in the middle"
        lines = (out / "evaluations" / "gsm8k.partial.jsonl").read_bytes().count(b'{"item": "row ')
        assert lines - 2 * after <= 2, "what is not in a complete batch is one batch at most"
    said = finish(start(*command(many, out)))
    assert "going on after" in said
    finish(start(*command(many, tmp_path / "whole")))
    require_same(out, tmp_path / "whole")


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.sweep
def test_ranks_share_the_batches_and_write_the_bytes_of_one(many: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "svdconvert"]
    finish(start(*command(many, tmp_path / "two"), program=launcher))
    finish(start(*command(many, tmp_path / "one")))
    require_same(tmp_path / "two", tmp_path / "one")
