"""The commands that take one model: decompose, train and convert."""

from dataclasses import replace
from typing import Annotated

import typer

from svdconvert.cli import progress, summaries
from svdconvert.cli.application import app
from svdconvert.cli.arguments import (
    BaseOpt,
    DebugOpt,
    DeviceOpt,
    ModelArg,
    OutOpt,
    OverwriteOpt,
    PlanOpt,
    RecipeOpt,
    StreamOpt,
    ThreadsOpt,
    TrustOpt,
    required,
    run_settings,
)
from svdconvert.cli.errors import report_errors
from svdconvert.cli.options import SingleOptions, Typed, with_options
from svdconvert.cli.process import configure_malloc_for_training
from svdconvert.cli.push_options import PushOpt, published, refuse_push_options
from svdconvert.config.options import ConvertOptions, PushOptions, SplitOptions
from svdconvert.config.recipe import is_shared, options, read_recipe
from svdconvert.config.train import TrainOptions


@app.command(
    cls=SingleOptions,
    epilog="Example: svdconvert decompose org/name -o pissa --method pissa --rank 64 --targets attn,mlp.down",
)
@with_options(PushOptions, into="pushing", panel="Publishing")
@with_options(SplitOptions)
def decompose(
    typed: Typed,
    pushing: Typed,
    model: ModelArg = None,
    out: OutOpt = None,
    recipe: RecipeOpt = None,
    plan: PlanOpt = False,
    overwrite: OverwriteOpt = False,
    threads: ThreadsOpt = None,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    stream: StreamOpt = False,
    push: PushOpt = None,
    debug: DebugOpt = False,
) -> None:
    """Split the target matrices of MODEL into a residual base and an initial adapter."""
    with report_errors(debug=debug, out=out):
        from svdconvert.commands.decompose import decompose as command
        from svdconvert.commands.decompose import plan_decompose
        from svdconvert.pipeline.effects import without_idle_seed

        shared = read_recipe(recipe)
        chosen = options(SplitOptions, shared, typed)
        if is_shared("seed", "decompose", shared, typed):
            chosen = without_idle_seed(chosen)
        source = required(model or shared.get("model"), "a MODEL")
        if plan:
            refuse_push_options(push, pushing)
            estimate = plan_decompose(source, chosen, trust_remote_code=trust_remote_code)
            summaries.show_estimate(source, estimate)
            return
        with published(out, push, pushing, stream=stream) as output:
            with progress.shown("decompose") as track:
                settings = {"overwrite": overwrite, "threads": threads, "device": device, "stream": stream}
                run = run_settings(shared, track, **settings)
                run = replace(run, trust_remote_code=trust_remote_code, shard_sink=output.shard_sink)
                manifest = command(source, output.directory, chosen, run)
            summaries.show_decomposed(output.place, manifest)


@app.command(
    cls=SingleOptions,
    epilog="Example: svdconvert train pissa -o trained --data train.jsonl --eval-rows 64 --steps 200",
)
@with_options(PushOptions, into="pushing", panel="Publishing")
@with_options(TrainOptions)
def train(
    typed: Typed,
    pushing: Typed,
    model: ModelArg = None,
    out: OutOpt = None,
    method: Annotated[
        str | None, typer.Option(help="The method by which a plain MODEL is split first. Default: pissa.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="The rank of a plain MODEL's adapter. Default: 64.")
    ] = None,
    base: BaseOpt = None,
    recipe: RecipeOpt = None,
    overwrite: OverwriteOpt = False,
    threads: ThreadsOpt = None,
    trust_remote_code: TrustOpt = False,
    log_every: Annotated[
        int | None,
        typer.Option("--log-every", min=1, help="Leave a line with the losses after every N steps."),
    ] = None,
    push: PushOpt = None,
    debug: DebugOpt = False,
) -> None:
    """Train the adapter of a decomposed directory, or a new adapter of a plain MODEL."""
    with report_errors(debug=debug, out=out):
        from svdconvert.commands.train import train as command
        from svdconvert.pipeline.effects import without_idle_seed
        from svdconvert.training.start import split_for

        configure_malloc_for_training()
        shared = read_recipe(recipe)
        source = required(model or shared.get("model"), "a MODEL")
        given = {name: value for name, value in (("method", method), ("rank", rank)) if value is not None}
        asked = options(SplitOptions, shared, given)
        if is_shared("seed", "decompose", shared):
            asked = without_idle_seed(asked)
        chosen = options(TrainOptions, shared, typed)
        settings = {"overwrite": overwrite, "threads": threads, "trust_remote_code": trust_remote_code}
        with published(out, push, pushing) as output:
            with progress.shown("train", log_every) as track:
                run = run_settings(shared, track, **settings)
                split = split_for(source, asked, [f"--{name}" for name in given], run.notify)
                manifest = command(source, output.directory, chosen, run, split=split, base=base)
            summaries.show_trained(output.place, manifest)


@app.command(
    cls=SingleOptions, epilog="Example: svdconvert convert RWKV-x060-World-1B6.pth -o hf --layout hf"
)
@with_options(PushOptions, into="pushing", panel="Publishing")
@with_options(ConvertOptions)
def convert(
    typed: Typed,
    pushing: Typed,
    model: ModelArg = None,
    out: OutOpt = None,
    recipe: RecipeOpt = None,
    overwrite: OverwriteOpt = False,
    stream: StreamOpt = False,
    push: PushOpt = None,
    debug: DebugOpt = False,
) -> None:
    """Write MODEL with the names of another layout, such as an RWKV-6 .pth for transformers, and back."""
    with report_errors(debug=debug, out=out):
        from svdconvert.commands.convert import convert as command

        shared = read_recipe(recipe)
        chosen = options(ConvertOptions, shared, typed)
        source = required(model or shared.get("model"), "a MODEL")
        with published(out, push, pushing, stream=stream) as output:
            with progress.shown("convert") as track:
                run = run_settings(shared, track, overwrite=overwrite)
                run = replace(run, stream=stream, shard_sink=output.shard_sink)
                manifest = command(source, output.directory, chosen, run)
            summaries.show_converted(output.place, manifest)
