"""The command eval: what it prints and writes, and that every option changes the result or is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from svdconvert.cli.app import app
from tests.evaluation.directories import answers_in, lively, write_questions
from tests.program import Ended, refused, succeeded, svdconvert

CODE = '{"task_id": 1, "text": "Return 1.", "code": "def f(): return 1", "test_list": ["assert f() == 1"]}\n'
OPTIONS: dict[str, list[Any]] = {
    "--data": ["DATA"],
    "--limit": [2],
    "--batch-size": [1],
    "--dtype": ["bfloat16"],
    "--max-new-tokens": [3],
    "--threads": [2],
    "--base": ["BASE"],
    "--residual": ["BASE"],
    "--run-code": [],
    "--sandbox": ["none"],
    "--regrade": [],
    "--compare": [],
    "--overwrite": [],
}
SHOWN = ("--json", "--debug", "--device", "--trust-remote-code", "--tasks", "--out")
"""What the other tests of this file, and those of other commands, try."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    lively(home / "base")
    write_questions(home / "data.jsonl", 5)
    write_questions(home / "other.jsonl", 4)
    (home / "code.jsonl").write_text(CODE)
    return home


@pytest.fixture(autouse=True)
def _threads() -> Any:
    """A command that is given other threads leaves them as they were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def words(home: Path, out: Path, *others: object) -> list[object]:
    usual = ["--data", home / "data.jsonl", "--max-new-tokens", 6, "--batch-size", 4, "--dtype", "float32"]
    return ["eval", home / "base", "--tasks", "gsm8k", *usual, "--threads", 1, "-o", out, *others]


def replaced(arguments: list[object], option: str, values: list[object]) -> list[object]:
    """The arguments with one option added, or with another value."""
    if option in arguments and values:
        place = arguments.index(option)
        return [*arguments[: place + 1], *values, *arguments[place + 2 :]]
    return [*arguments, option, *values]


def result(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "evaluations" / "gsm8k.json").read_text())
    return found | {"seconds": None}


def test_a_table_is_printed_and_results_are_written(home: Path, tmp_path: Path) -> None:
    ended = succeeded(*words(home, tmp_path / "out"))
    assert "strict" in ended.out and "paper" in ended.out
    assert result(tmp_path / "out")["grades"]["strict"]["n"] == 5
    assert [line["id"] for line in answers_in(tmp_path / "out")] == ["1", "2", "3", "4", "5"]
    document = json.loads(succeeded(*words(home, tmp_path / "out"), "--json").out)
    assert document[0] | {"seconds": None} == result(tmp_path / "out")


def test_results_are_written_into_the_directory_itself(home: Path) -> None:
    arguments = words(home, home)
    del arguments[arguments.index("-o") : arguments.index("-o") + 2]
    succeeded(*arguments)
    assert (home / "base" / "evaluations" / "gsm8k.json").is_file()


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_changes_the_result_or_is_refused(option: str, home: Path, tmp_path: Path) -> None:
    before = result_of(words(home, tmp_path / "before"), tmp_path / "before")
    places = {"DATA": home / "other.jsonl", "BASE": home / "base"}
    values = [places.get(value, value) for value in OPTIONS[option]]
    out = tmp_path / ("before" if option == "--overwrite" else "after")
    arguments = replaced(words(home, out), option, values)
    time = (tmp_path / "before" / "evaluations" / "gsm8k.json").stat().st_mtime_ns
    ended = svdconvert(*arguments)
    if option == "--overwrite":
        assert (out / "evaluations" / "gsm8k.json").stat().st_mtime_ns > time, "it asked the model again"
    elif ended.status == 0:
        assert result(out) != before
    else:
        assert option in ended.err
        assert not out.exists()


def result_of(arguments: list[object], out: Path) -> dict[str, Any]:
    succeeded(*arguments)
    return result(out)


def test_every_option_of_the_command_is_tried() -> None:
    command: Any = typer.main.get_command(app).commands["eval"]  # type: ignore[attr-defined]
    every = {one.opts[-1] for one in command.params if one.param_type_name == "option"}
    assert every - {*OPTIONS, *SHOWN} == set()


def test_a_model_that_is_not_here_needs_a_place_for_its_results(home: Path) -> None:
    refused("eval", "org/name", "--tasks", "gsm8k", words=["org/name", "-o"])


def test_unknown_tasks_and_wrong_rows_are_refused_by_name(home: Path, tmp_path: Path) -> None:
    refused("eval", home / "base", "--tasks", "gsm9k", "-o", tmp_path, words=["gsm9k", "did you mean gsm8k"])
    (tmp_path / "rows.jsonl").write_text('{"question": "1"}\n')
    data = ["--data", tmp_path / "rows.jsonl"]
    refused("eval", home / "base", "--tasks", "gsm8k", *data, "-o", tmp_path, words=["row 1", "answer"])
    refused(
        "eval", home / "base", "--tasks", "gsm8k,math", *data, "-o", tmp_path, words=["--data", "one task"]
    )
    assert not (tmp_path / "evaluations").exists()


def test_code_is_run_only_if_that_is_typed(home: Path, tmp_path: Path) -> None:
    code = ["eval", home / "base", "--tasks", "mbpp", "--data", home / "code.jsonl", "-o", tmp_path / "out"]
    refused(*code, words=["mbpp", "--run-code"])
    assert not (tmp_path / "out").exists()


def test_results_of_several_directories_are_compared(home: Path, tmp_path: Path) -> None:
    for name, tokens in (("one", 6), ("two", 4)):
        succeeded(*replaced(words(home, tmp_path / name), "--max-new-tokens", [tokens]))
    ended: Ended = succeeded("eval", tmp_path / "one", tmp_path / "two", "--compare")
    assert "McNemar" in ended.out
    document = json.loads(succeeded("eval", tmp_path / "one", tmp_path / "two", "--compare", "--json").out)
    assert [Path(one["directory"]).name for one in document["tasks"][0]["results"]] == ["one", "two"]
    wrong = svdconvert("eval", tmp_path / "one", tmp_path / "two", "--compare", "--limit", 2)
    assert wrong.status == 2 and "--limit changes nothing" in wrong.err


@pytest.mark.parametrize(("limit", "is_idle"), [(4, False), (5, True), (6, True)])
def test_a_limit_above_the_number_of_rows_is_named(
    limit: int, is_idle: bool, home: Path, tmp_path: Path
) -> None:
    ended = succeeded(*words(home, tmp_path / "out", "--limit", limit))
    said = " ".join(ended.err.split())
    assert (f"--limit {limit} changes nothing for gsm8k: data.jsonl has no more rows" in said) is is_idle
