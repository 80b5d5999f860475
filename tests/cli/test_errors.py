"""Every exception ends in one sentence; --debug lets it through."""

import errno
from traceback import format_exception

import pytest
import typer

from svdconvert.cli.errors import report_errors
from svdconvert.errors import CheckpointError

UNEXPECTED = [
    RuntimeError("a library\n  complains"),
    KeyError("missing"),
    IndexError("list index out of range"),
    RecursionError("maximum recursion depth exceeded"),
    AssertionError(),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ZeroDivisionError("division by zero"),
]


@pytest.mark.parametrize("error", UNEXPECTED, ids=lambda error: type(error).__name__)
def test_an_unexpected_exception_is_one_sentence_that_names_it(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended, report_errors(debug=False):
        raise error
    assert ended.value.exit_code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"svdconvert: unexpected {type(error).__name__}")
    assert "--debug" in line


def test_an_error_of_the_system_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), report_errors(debug=False):
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x")
    assert "svdconvert: /data/x: No space left on device" in capsys.readouterr().err


def test_no_memory_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), report_errors(debug=False):
        raise MemoryError
    assert "not enough memory" in capsys.readouterr().err


def test_debug_lets_the_exception_through() -> None:
    with pytest.raises(ValueError, match="as it is"), report_errors(debug=True):
        raise ValueError("as it is")


def test_debug_shows_no_token() -> None:
    token = "hf_" + "a1" * 6
    with pytest.raises(ValueError, match=r"made/\*\*\* is") as shown, report_errors(debug=True):
        try:
            raise OSError(token)
        except OSError as error:
            raise ValueError(f"made/{token} is no directory") from error
    assert token not in "".join(format_exception(shown.value))


def test_foreign_text_in_a_sentence_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), report_errors(debug=False):
        raise CheckpointError("tensor \x1b[31m[bold]x[/bold]\nsecond line is wrong")
    assert capsys.readouterr().err == ("svdconvert: tensor \\x1b[31m[bold]x[/bold]\\nsecond line is wrong\n")


@pytest.mark.parametrize("ended", [typer.Exit(3), typer.BadParameter("wrong")])
def test_what_typer_prints_itself_passes(ended: Exception) -> None:
    with pytest.raises(type(ended)), report_errors(debug=False):
        raise ended
