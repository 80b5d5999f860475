"""The program without its commands, which the other modules add to it."""

from typing import Annotated

import typer

from svdconvert.cli import summaries
from svdconvert.cli.errors import report_errors
from svdconvert.cli.options import Commands
from svdconvert.version import __version__

app = typer.Typer(
    cls=Commands,
    name="svdconvert",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Split a checkpoint into a residual base and an adapter, train the adapter, and merge it.",
    epilog="Start with: svdconvert decompose org/name -o DIR --plan",
)


@app.callback(invoke_without_command=True)
def start(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """Split a checkpoint into a residual base and an adapter, train the adapter, and merge it."""
    if version:
        with report_errors(debug=False):
            summaries.show_line(f"svdconvert {__version__}")
        raise typer.Exit
