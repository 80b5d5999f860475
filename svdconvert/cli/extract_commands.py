"""The command that makes an adapter of two checkpoints: extract."""

from typing import Annotated

import typer

from svdconvert.cli import comparison_summaries, progress
from svdconvert.cli.application import app
from svdconvert.cli.arguments import (
    DebugOpt,
    DeviceOpt,
    JsonOpt,
    OutOpt,
    OverwriteOpt,
    PlanOpt,
    ReadOnlyStreamOpt,
    RecipeOpt,
    ThreadsOpt,
    TrustOpt,
    option,
    run_settings,
)
from svdconvert.cli.errors import report_errors
from svdconvert.cli.help import examples
from svdconvert.cli.option_groups import GENERAL
from svdconvert.cli.options import SingleOptions, Typed, with_options
from svdconvert.cli.push_options import PushOpt, check_plan, published
from svdconvert.config.options import ExtractOptions, PushOptions
from svdconvert.config.recipe import options, read_recipe


@app.command(
    cls=SingleOptions,
    epilog=examples(
        "svdconvert extract org/name org/name-instruct -o lora --plan --sketch",
        "svdconvert extract org/name org/name-instruct -o lora --energy 0.9",
    ),
)
@with_options(PushOptions, into="pushing", panel="Publishing")
@with_options(ExtractOptions)
def extract(
    typed: Typed,
    pushing: Typed,
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The untouched model, for which the LoRA is made.")
    ],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The same model after training or merging.")],
    out: OutOpt = None,
    recipe: RecipeOpt = None,
    plan: PlanOpt = False,
    sketch: Annotated[
        bool,
        option("--sketch", None, "With --plan: read the weights, and predict the error by rank.", GENERAL),
    ] = False,
    overwrite: OverwriteOpt = False,
    threads: ThreadsOpt = None,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    stream: ReadOnlyStreamOpt = False,
    push: PushOpt = None,
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Write the change from BASE to TUNED as a standard LoRA for BASE, with its measured error."""
    with report_errors(debug=debug, out=out, json=json):
        from svdconvert.commands.extract import extract as command
        from svdconvert.commands.extract import plan_extract

        if sketch and not plan:
            raise typer.BadParameter("--sketch is an option of --plan; add --plan, or leave it out")
        settings = {"overwrite": overwrite, "threads": threads, "device": device}
        settings |= {"trust_remote_code": trust_remote_code}
        shared = read_recipe(recipe)
        chosen = options(ExtractOptions, shared, typed)
        if plan:
            check_plan(out, push, pushing, shared, overwrite=overwrite)
            with progress.shown("extract --plan") as track:
                run = run_settings(shared, track, **settings)
                found = plan_extract(base, tuned, chosen, run, sketch=sketch)
            comparison_summaries.show_extract_plan(base, tuned, found)
            return
        with published(out, push, pushing, shared) as output:
            with progress.shown("extract") as track:
                run = run_settings(shared, track, **settings, stream=stream)
                manifest = command(base, tuned, output.directory, chosen, run)
            comparison_summaries.show_extracted(output.place, manifest)
