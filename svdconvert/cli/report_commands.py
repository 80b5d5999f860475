"""The commands that describe, check or publish what exists, and write no tensors."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from svdconvert.cli import comparison_summaries, progress, summaries
from svdconvert.cli.application import app
from svdconvert.cli.arguments import (
    DebugOpt,
    DeviceOpt,
    JsonOpt,
    ReadOnlyStreamOpt,
    ThreadsOpt,
    TrustOpt,
    required,
    run_settings,
)
from svdconvert.cli.errors import report_errors
from svdconvert.cli.options import SingleOptions, Typed, with_options
from svdconvert.cli.terminal import as_json, notify
from svdconvert.config.execution import Run
from svdconvert.config.options import PushOptions
from svdconvert.config.recipe import Recipe
from svdconvert.config.sizes import size_text


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

        with progress.shown("push"):
            options = PushOptions(**typed)
            run = Run(notify=notify)
            done = command(directory, repository, options, base=base, residual=residual, run=run)
        summaries.show_published(directory, repository, done)


@app.command(cls=SingleOptions, epilog="Example: svdconvert verify pissa --base org/name")
def verify(
    directory: Annotated[
        str | None,
        typer.Argument(metavar="[DIR]", help="A directory that svdconvert wrote, local or on the Hub."),
    ] = None,
    merged: Annotated[
        str | None,
        typer.Option(
            "--merged", help="A checkpoint into which any program merged --adapter, instead of DIR."
        ),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="The adapter that was merged into --merged.")
    ] = None,
    base: Annotated[
        list[str] | None,
        typer.Option("--base", help="The base's location; with --merged several, to find the one that fits."),
    ] = None,
    nuclear_ratio: Annotated[
        str | None,
        typer.Option(
            help="Measure nuclear-norm error ratios of a 4-bit residual: all, or a number per role."
        ),
    ] = None,
    debug: DebugOpt = False,
) -> None:
    """Recompute the checksums and errors in DIR's manifest, or audit a merge; status 1 if one is wrong."""
    with report_errors(debug=debug, out=None):
        if merged is not None:
            _verify_merge(directory, merged, adapter, base or [])
            return
        from svdconvert.commands.verify import verify as command

        if adapter is not None:
            raise typer.BadParameter(
                "--adapter is an option of --merged; add --merged MODEL, or leave it out"
            )
        if base and len(base) > 1:
            raise typer.BadParameter("several --base belong to --merged; give one")
        with progress.shown("verify") as track:
            run = Run(track=track)
            own = base[0] if base else None
            report = command(required(directory, "a DIR"), run, base=own, nuclear_ratio=nuclear_ratio)
        summaries.show_report(report)
        if not report.passed:
            raise typer.Exit(1)


def _verify_merge(directory: str | None, merged: str, adapter: str | None, bases: list[str]) -> None:
    """Audit a merge, and end with status 1 if no base fits."""
    from svdconvert.commands.verify import verify_merge

    if directory is not None:
        raise typer.BadParameter(f"{directory} and --merged exclude each other: give one")
    given = required(adapter, "--adapter ADAPTER")
    if not bases:
        raise typer.BadParameter("--base BASE is missing")
    with progress.shown("verify") as track:
        audit = verify_merge(merged, bases, given, Run(track=track))
    comparison_summaries.show_audit(audit)
    if not audit.passed:
        raise typer.Exit(1)


@app.command(
    cls=SingleOptions, epilog="Example: svdconvert diff org/name org/name-instruct --picture diff.svg"
)
def diff(
    first: Annotated[
        str, typer.Argument(metavar="A", help="A checkpoint or an adapter, local or on the Hub.")
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one of the same model.")],
    json: JsonOpt = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Write the changes by layer and role to this .svg file.")
    ] = None,
    stream: ReadOnlyStreamOpt = False,
    threads: ThreadsOpt = None,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Show where and how much two checkpoints differ, or two adapters."""
    with report_errors(debug=debug, out=None):
        from svdconvert.commands.diff import diff as command
        from svdconvert.reports.diff_picture import check_picture, write_picture

        if picture is not None:
            check_picture(picture)
        with progress.shown("diff") as track:
            settings = {"threads": threads, "device": device, "stream": stream}
            run = run_settings(Recipe(), track, **settings, trust_remote_code=trust_remote_code)
            found = command(first, second, run)
        if picture is not None:
            write_picture(picture, found)
        as_json(comparison_summaries.diff_json(found)) if json else comparison_summaries.show_diff(found)


@app.command(cls=SingleOptions, epilog="Example: svdconvert inspect trained --json")
def inspect(
    model: Annotated[str, typer.Argument(metavar="DIR|MODEL", help="Any directory, or org/name[@revision].")],
    engine: Annotated[
        Literal["peft", "vllm", "sglang", "mlx", "llama.cpp"] | None,
        typer.Option("--for", help="Say what this engine will refuse or ignore of the adapter."),
    ] = None,
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Describe a directory: what it is, which base it belongs to, and which commands can follow."""
    with report_errors(debug=debug, out=None):
        from dataclasses import asdict

        from svdconvert.commands.inspect import inspect as command

        with progress.shown("inspect"):
            found = command(model, engine)
        as_json(asdict(found)) if json else summaries.show_inspection(found)


@app.command(cls=SingleOptions, epilog="Example: svdconvert report pissa trained merged -o page.html")
def report(
    directories: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Directories or adapters, local or on the Hub.")
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The page to write; ends in .html.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a report that nobody has edited.")
    ] = False,
    threads: ThreadsOpt = None,
    debug: DebugOpt = False,
) -> None:
    """Write one page about directories: energies, errors, spectra, losses, drift, scores and samples."""
    with report_errors(debug=debug, out=None):
        from svdconvert.commands.report import report as command

        page = required(out, "-o PAGE.html")
        with progress.shown("report") as track:
            command(directories, page, Run(overwrite=overwrite, threads=threads, track=track))
        summaries.summary(
            f"wrote {page}", {"directories": len(directories), "size": size_text(page.stat().st_size)}
        )


@app.command(cls=SingleOptions, name="list", epilog="Example: svdconvert list methods")
def list_(
    what: Annotated[
        Literal["methods", "layouts", "merges", "formats", "tasks", "recipes"],
        typer.Argument(help="What to list."),
    ],
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """List methods, layouts, methods that merge, formats of weights, tasks of eval, or recipes."""
    with report_errors(debug=debug):
        from svdconvert.commands.list_plugins import list_plugins

        rows = list_plugins(what)
        as_json(rows) if json else summaries.catalogue(rows)
