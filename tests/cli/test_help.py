"""Every help is readable in 80 columns: whole words, groups, one sentence for every option, no internals."""

import re
from typing import Any

import pytest
from typer.main import get_command

from svdconvert.cli.app import app
from svdconvert.cli.option_groups import GENERAL, ORDER, OTHERS, RESULT
from tests.program import succeeded

PROGRAM: Any = get_command(app)
COMMANDS: dict[str, Any] = PROGRAM.commands
PYTHON_NAME = re.compile(r"(?<![\w/.{-])[a-z]+(?:_[a-z]+)+(?![\w./}])")
FILES = {"adapter_config", "svdconvert", "model_type"}


def shown(name: str, monkeypatch: pytest.MonkeyPatch, width: int) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    return succeeded(*name.split(), "--help").out


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_help_fits_into_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(name, monkeypatch, 80)
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert [sign for sign in ("…", "Undefined", "Default: .", "`", "<", "{'", "None") if sign in text] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_shown_whole_with_a_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = words(shown(name, monkeypatch, 80))
    for parameter in COMMANDS[name].params:
        sentence = parameter.help
        assert sentence and sentence[-1] in ".?", parameter.name
        assert len(sentence) < 160, parameter.name
        assert words(sentence) in text
        metavar = parameter.metavar or ""
        if parameter.param_type_name == "argument":
            assert f"{metavar} " in text
            continue
        flag = f"--[no-]{parameter.opts[-1][2:]} " if parameter.secondary_opts else f"{parameter.opts[-1]} "
        assert flag in text
        takes_value = not parameter.is_flag
        assert (f"{flag}{metavar} " in text and metavar != "") or not takes_value, parameter.name


@pytest.mark.parametrize("name", COMMANDS)
def test_sentences_name_options_as_they_are_typed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {parameter.name for parameter in COMMANDS[name].params}
    found = {*PYTHON_NAME.findall(shown(name, monkeypatch, 80))} - FILES
    assert found & options == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_stands_under_a_heading(name: str) -> None:
    titles = {parameter.rich_help_panel for parameter in COMMANDS[name].params if parameter.metavar}
    assert titles - {None} <= {*ORDER}
    options = [one for one in COMMANDS[name].params if one.param_type_name == "option"]
    assert [one.name for one in options if one.rich_help_panel in (None, OTHERS)] == []


def test_the_options_of_train_are_in_groups() -> None:
    titles = [one.rich_help_panel for one in COMMANDS["train"].params]
    assert {"Data", "Optimizer", "Evaluation", "Saving", "Memory and speed", "Tracking"} <= {*titles}
    assert RESULT not in titles
    assert max(titles.count(title) for title in titles if title) < 20


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_h_is_help(name: str) -> None:
    assert succeeded(*name.split(), "-h").out == succeeded(*name.split(), "--help").out


def test_a_wide_terminal_does_not_make_wide_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(map(len, shown("train", monkeypatch, 200).splitlines())) <= 100
    assert GENERAL in shown("train", monkeypatch, 30)


def test_completion_can_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown("", monkeypatch, 80)
    assert "--install-completion" in text
    assert "--show-completion" in text
