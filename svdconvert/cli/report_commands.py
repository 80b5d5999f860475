"""The commands that describe, check or publish what exists, and write no tensors."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from svdconvert.cli import progress, summaries
from svdconvert.cli.application import app
from svdconvert.cli.arguments import (
    BaseOpt,
    DebugOpt,
    DirArg,
    JsonOpt,
)
from svdconvert.cli.errors import report_errors
from svdconvert.cli.options import SingleOptions, Typed, with_options
from svdconvert.cli.terminal import as_json
from svdconvert.config.execution import Run
from svdconvert.config.options import PushOptions


@app.command(cls=SingleOptions, epilog="Example: svdconvert push pissa me/name-pissa-r64 --private")
@with_options(PushOptions, panel="Publishing")
def push(
    typed: Typed,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that svdconvert wrote.")],
    repository: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="The repository; it is created if it does not exist.")
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="The base's org/name, if it was read from a local directory.")
    ] = None,
    residual: Annotated[
        str | None,
        typer.Option("--residual", help="The residual's org/name, if it was read from a local directory."),
    ] = None,
    debug: DebugOpt = False,
) -> None:
    """Publish DIR with a card; files that the Hub already has are not sent again."""
    with report_errors(debug=debug, out=None):
        from svdconvert.commands.push import push as command

        done = command(directory, repository, PushOptions(**typed), base=base, residual=residual)
        summaries.show_published(directory, repository, done)


@app.command(cls=SingleOptions, epilog="Example: svdconvert verify pissa --base org/name")
def verify(
    directory: DirArg,
    base: BaseOpt = None,
    nuclear_ratio: Annotated[
        str | None,
        typer.Option(
            help="Measure nuclear-norm error ratios of a 4-bit residual: all, or a number per role."
        ),
    ] = None,
    debug: DebugOpt = False,
) -> None:
    """Recompute the checksums and errors in DIR's manifest; the exit status is 1 if one is wrong."""
    with report_errors(debug=debug, out=None):
        from svdconvert.commands.verify import verify as command

        with progress.tensors("verify", of_bytes=False) as track:
            report = command(directory, Run(track=track), base=base, nuclear_ratio=nuclear_ratio)
        summaries.show_report(report)
        if not report.passed:
            raise typer.Exit(1)


@app.command(cls=SingleOptions, epilog="Example: svdconvert inspect trained --json")
def inspect(
    model: Annotated[str, typer.Argument(metavar="DIR|MODEL", help="Any directory, or org/name[@revision].")],
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Describe a directory: what it is, which base it belongs to, and which commands can follow."""
    with report_errors(debug=debug, out=None):
        from dataclasses import asdict

        from svdconvert.commands.inspect import inspect as command

        found = command(model)
        as_json(asdict(found)) if json else summaries.show_inspection(found)


@app.command(cls=SingleOptions, name="list", epilog="Example: svdconvert list methods")
def list_(
    what: Annotated[Literal["methods", "layouts", "formats"], typer.Argument(help="What to list.")],
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """List the methods, the layouts, or the formats of quantised weights."""
    with report_errors(debug=debug):
        from svdconvert.commands.list_plugins import list_plugins

        rows = list_plugins(what)
        as_json(rows) if json else summaries.catalogue(rows)
