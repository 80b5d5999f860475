"""The commands that describe, check or publish what exists, and write no tensors."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from svdconvert.cli import comparison_summaries, plan_summaries, progress, summaries
from svdconvert.cli.answers import notify
from svdconvert.cli.application import app
from svdconvert.cli.arguments import (
    DebugOpt,
    DeviceOpt,
    JsonOpt,
    ReadOnlyStreamOpt,
    ThreadsOpt,
    TrustOpt,
    option,
    required,
    run_settings,
)
from svdconvert.cli.errors import report_errors
from svdconvert.cli.help import examples
from svdconvert.cli.option_groups import GENERAL, INPUTS, RESULT, SAVING
from svdconvert.cli.options import SingleOptions, Typed, with_options
from svdconvert.config.execution import Run
from svdconvert.config.options import PushOptions
from svdconvert.config.recipe import Recipe
from svdconvert.config.sizes import size_text


@app.command(cls=SingleOptions, epilog=examples("svdconvert push pissa me/name-pissa-r64 --private --plan"))
@with_options(PushOptions, panel="Publishing")
def push(
    typed: Typed,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that svdconvert wrote.")],
    repository: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="The repository; it is created if it does not exist.")
    ],
    base: Annotated[
        str | None,
        option("--base", "ORG/NAME", "The base's name, if it was read from a local directory.", INPUTS),
    ] = None,
    residual: Annotated[
        str | None,
        option("--residual", "ORG/NAME", "The residual's name, if it was read from a local one.", INPUTS),
    ] = None,
    plan: Annotated[
        bool, option("--plan", None, "Send nothing; print which files would be sent.", GENERAL)
    ] = False,
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Publish DIR with a card; files that the Hub already has are not sent again."""
    with report_errors(debug=debug, json=json):
        from svdconvert.commands.push import plan_push
        from svdconvert.commands.push import push as command

        asked = PushOptions(**typed)
        places: dict[str, Any] = {"base": base, "residual": residual}
        if plan:
            plan_summaries.show_push_plan(directory, plan_push(directory, repository, asked, **places))
            return
        with progress.shown("push"):
            run = Run(notify=notify)
            done = command(directory, repository, asked, run=run, **places)
        summaries.show_published(directory, repository, done)


@app.command(cls=SingleOptions, epilog=examples("svdconvert verify pissa --base org/name"))
def verify(
    directory: Annotated[
        str | None,
        typer.Argument(metavar="[DIR]", help="A directory that svdconvert wrote, local or on the Hub."),
    ] = None,
    merged: Annotated[
        str | None,
        option(
            "--merged",
            "MODEL",
            "A checkpoint into which any program merged --adapter, instead of DIR.",
            INPUTS,
        ),
    ] = None,
    adapter: Annotated[
        str | None, option("--adapter", "ADAPTER", "The adapter that was merged into --merged.", INPUTS)
    ] = None,
    base: Annotated[
        list[str] | None,
        option(
            "--base",
            "MODEL",
            "The base's location; with --merged several, to find the one that fits.",
            INPUTS,
        ),
    ] = None,
    nuclear_ratio: Annotated[
        str | None,
        option(
            "--nuclear-ratio",
            "all|N",
            "Measure nuclear-norm error ratios of a 4-bit residual: all, or a number per role.",
            RESULT,
        ),
    ] = None,
    trust_remote_code: TrustOpt = False,
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Recompute the checksums and errors in DIR's manifest, or audit a merge; status 1 if one is wrong."""
    with report_errors(debug=debug, json=json):
        if merged is not None:
            if nuclear_ratio is not None:
                raise typer.BadParameter("--nuclear-ratio is about a DIR, not about --merged; leave it out")
            return _verify_merge(directory, merged, adapter, base or [], trust_remote_code=trust_remote_code)
        from svdconvert.commands.verify import verify as command

        for name, unused in (("--adapter", adapter), ("--trust-remote-code", trust_remote_code)):
            if unused:
                raise typer.BadParameter(
                    f"{name} is an option of --merged; add --merged MODEL, or leave it out"
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


def _verify_merge(
    directory: str | None, merged: str, adapter: str | None, bases: list[str], *, trust_remote_code: bool
) -> None:
    """Audit a merge, and end with status 1 if no base fits."""
    from svdconvert.commands.verify import verify_merge

    if directory is not None:
        raise typer.BadParameter(f"{directory} and --merged exclude each other: give one")
    given = required(adapter, "--adapter ADAPTER")
    if not bases:
        raise typer.BadParameter("--base BASE is missing")
    with progress.shown("verify") as track:
        run = Run(track=track, notify=notify, trust_remote_code=trust_remote_code)
        audit = verify_merge(merged, bases, given, run)
    comparison_summaries.show_audit(audit)
    if not audit.passed:
        raise typer.Exit(1)


@app.command(
    cls=SingleOptions, epilog=examples("svdconvert diff org/name org/name-instruct --picture diff.svg")
)
def diff(
    first: Annotated[
        str, typer.Argument(metavar="A", help="A checkpoint or an adapter, local or on the Hub.")
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one of the same model.")],
    picture: Annotated[
        Path | None,
        option("--picture", "FILE", "Write the changes by layer and role to this .svg file.", SAVING),
    ] = None,
    stream: ReadOnlyStreamOpt = False,
    threads: ThreadsOpt = None,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Show where and how much two checkpoints differ, or two adapters."""
    with report_errors(debug=debug, json=json):
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
        comparison_summaries.show_diff(found)


@app.command(cls=SingleOptions, epilog=examples("svdconvert inspect trained --json"))
def inspect(
    model: Annotated[str, typer.Argument(metavar="DIR|MODEL", help="Any directory, or org/name[@revision].")],
    engine: Annotated[
        Literal["peft", "vllm", "sglang", "mlx", "llama.cpp"] | None,
        option(
            "--for",
            "peft|vllm|sglang|mlx|llama.cpp",
            "Say what this engine will refuse or ignore of the adapter.",
            RESULT,
        ),
    ] = None,
    trust_remote_code: TrustOpt = False,
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Describe a directory: what it is, which base it belongs to, and which commands can follow."""
    with report_errors(debug=debug, json=json):
        from svdconvert.commands.inspect import inspect as command

        with progress.shown("inspect"):
            found = command(model, engine, trust_remote_code=trust_remote_code)
        summaries.show_inspection(found)


@app.command(cls=SingleOptions, epilog=examples("svdconvert report pissa trained merged -o page.html"))
def report(
    directories: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Directories or adapters, local or on the Hub.")
    ],
    out: Annotated[
        Path | None, option("-o, --out", "FILE", "The page to write; its name ends in .html.", SAVING)
    ] = None,
    overwrite: Annotated[
        bool, option("--overwrite", None, "Replace a report that nobody has edited.", SAVING)
    ] = False,
    threads: ThreadsOpt = None,
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Write one page about directories: energies, errors, spectra, losses, drift, scores and samples."""
    with report_errors(debug=debug, json=json):
        from svdconvert.commands.report import report as command

        page = required(out, "-o PAGE.html")
        with progress.shown("report") as track:
            command(directories, page, Run(overwrite=overwrite, threads=threads, track=track))
        size = page.stat().st_size
        summaries.summary(
            f"wrote {page}",
            {"directories": len(directories), "size": size_text(size)},
            facts={"page": str(page), "directories": directories, "bytes": size},
        )


@app.command(
    cls=SingleOptions,
    name="list",
    epilog=examples("svdconvert list methods", "svdconvert list methods pissa"),
)
def list_(
    what: Annotated[
        Literal["methods", "layouts", "merges", "formats", "tasks", "recipes"],
        typer.Argument(metavar="methods|layouts|merges|formats|tasks|recipes", help="What to list."),
    ],
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Only this one, with all that is known of it.")
    ] = None,
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """List methods, layouts, methods that merge, formats of weights, tasks of eval, or recipes."""
    with report_errors(debug=debug, json=json):
        from svdconvert.commands.list_plugins import in_words, list_plugins

        rows = list_plugins(what, name)
        if name is None:
            summaries.catalogue(rows, f"svdconvert list {what} NAME")
        else:
            summaries.described(rows[0], in_words(rows[0]))
