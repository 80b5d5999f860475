"""The program without its commands, which the other modules add to it."""

from typing import Annotated

import typer

from svdconvert.cli import summaries
from svdconvert.cli.errors import report_errors
from svdconvert.cli.help import examples
from svdconvert.cli.options import Commands
from svdconvert.version import __version__

app = typer.Typer(
    cls=Commands,
    name="svdconvert",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Split a checkpoint into a residual base and an adapter, train the adapter, and merge it.",
    epilog=examples("svdconvert decompose org/name -o pissa --rank 64 --plan", "svdconvert train -h"),
)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """Split a checkpoint into a residual base and an adapter, train the adapter, and merge it."""
    if version:
        with report_errors(debug=False):
            summaries.show_line(f"svdconvert {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
