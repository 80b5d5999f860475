"""Turns errors into one sentence and an exit status: 1 failed, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from typing import NoReturn

import typer

from svdconvert.cli.answers import Answer, answering, print_failure
from svdconvert.cli.signals import TerminatedError, raise_on_signals
from svdconvert.cli.terminal import say
from svdconvert.cli.wording import as_typed
from svdconvert.errors import MissingOptionError, SvdConvertError
from svdconvert.hub.auth import scrub_exception

# Exceptions by which Typer ends a command, and which it prints itself.
_TYPER = (typer.Exit, typer.Abort, typer.BadParameter)
_LONGEST = 600  # characters that are shown of a library's message


@contextmanager
def report_errors(*, debug: bool, out: object = None, json: bool = False) -> Iterator[None]:
    """Turn every exception into one sentence on standard error and an exit status.

    `debug` lets exceptions through, with their traceback. `out` is the output directory, whose staging
    directory is mentioned if an interrupted run left one. With `json` one document goes to standard output:
    what the command's summaries told, or the error.
    """
    with raise_on_signals(), answering(json=json) as answer:
        try:
            with _answered(answer):
                yield
        except MissingOptionError as error:
            raise typer.BadParameter(as_typed(str(error))) from None
        except _TYPER:
            raise
        except KeyboardInterrupt:
            _stop(f"interrupted{_how_to_continue(out)}", 130, answer)
        except TerminatedError:
            _stop(f"terminated{_how_to_continue(out)}", 143, answer)
        except BrokenPipeError:
            raise typer.Exit(0) from None  # the reader closed the pipe, as `| head` does
        except Exception as error:
            if debug:
                scrub_exception(error)
                raise
            _stop(str(error) if isinstance(error, SvdConvertError) else _unexpected(error), 1, answer)


@contextmanager
def _answered(answer: Answer | None) -> Iterator[None]:
    """Print the document when the command ends, also with an exit status of its own, as verify does."""
    try:
        yield
    except typer.Exit:
        if answer is not None:
            answer.print()
        raise
    if answer is not None:
        answer.print()


def _unexpected(error: Exception) -> str:
    """A sentence for an exception that no part of the program expected."""
    if isinstance(error, MemoryError):
        return "there is not enough memory; close other programs, or give a smaller --batch-size"
    message = " ".join(str(error).split())[:_LONGEST]
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror}; fix that and run the same command again"
    frames = extract_tb(error.__traceback__)
    own = [frame for frame in frames if "svdconvert" in Path(frame.filename).parts]
    location = f" in {Path(own[-1].filename).name}, {own[-1].name}" if own else ""
    return (
        f"unexpected {type(error).__name__}{location}: {message or 'no message'}; "
        "run the command with --debug to see the traceback, and please report it"
    )


def _how_to_continue(out: object) -> str:
    if out is None:
        return ""
    if Path(f"{out}.partial").exists():
        return f"; the same command continues from {out}.partial"
    return "; nothing had been kept yet, so the same command starts again"


def _stop(sentence: str, status: int, answer: Answer | None) -> NoReturn:
    say(sentence)
    if answer is not None:
        print_failure(sentence, status, answer)
    raise typer.Exit(status)
