"""The commands that take one model: decompose, train and convert."""

from dataclasses import replace
from typing import Annotated

from svdconvert.cli import plan_summaries, progress, summaries
from svdconvert.cli.application import app
from svdconvert.cli.arguments import (
    BaseOpt,
    DebugOpt,
    DeviceOpt,
    JsonOpt,
    ModelArg,
    OutOpt,
    OverwriteOpt,
    PlanOpt,
    RecipeOpt,
    StreamOpt,
    ThreadsOpt,
    TrainPlanOpt,
    TrustOpt,
    option,
    required,
    run_settings,
)
from svdconvert.cli.errors import report_errors
from svdconvert.cli.help import examples
from svdconvert.cli.option_groups import NEW_ADAPTER, TRACKING
from svdconvert.cli.options import SingleOptions, Typed, with_options
from svdconvert.cli.process import configure_malloc_for_training
from svdconvert.cli.push_options import PushOpt, check_plan, published
from svdconvert.cli.wording import spelled
from svdconvert.config.options import ConvertOptions, PushOptions, SplitOptions
from svdconvert.config.recipe import is_shared, options, read_recipe
from svdconvert.config.train import TrainOptions

_OF_NEW_ADAPTER = ("method", "rank", "alpha", "rslora", "targets")
"""The options of decompose that train has too, for a plain MODEL."""


@app.command(
    cls=SingleOptions,
    epilog=examples(
        "svdconvert decompose org/name -o pissa --rank 64 --plan",
        "svdconvert decompose org/name -o pissa --rank 16 --targets attn,mlp.down",
        "svdconvert decompose org/name -o qpissa --rank 64 --residual-format nf4",
        "svdconvert decompose org/name --stream --push me/name-pissa-r64",
    ),
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
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Split the target matrices of MODEL into a residual base and an initial adapter."""
    with report_errors(debug=debug, out=out, json=json):
        from svdconvert.commands.decompose import decompose as command
        from svdconvert.commands.decompose import plan_decompose
        from svdconvert.pipeline.effects import without_idle_seed

        shared = read_recipe(recipe)
        chosen = options(SplitOptions, shared, typed)
        if is_shared("seed", "decompose", shared, typed):
            chosen = without_idle_seed(chosen)
        source = required(model or shared.get("model"), "a MODEL")
        if plan:
            check_plan(out, push, pushing, shared, overwrite=overwrite)
            estimate = plan_decompose(source, chosen, trust_remote_code=trust_remote_code)
            summaries.show_estimate(source, estimate)
            return
        with published(out, push, pushing, shared, stream=stream) as output:
            with progress.shown("decompose") as track:
                settings = {"overwrite": overwrite, "threads": threads, "device": device, "stream": stream}
                run = run_settings(shared, track, **settings)
                run = replace(run, trust_remote_code=trust_remote_code, shard_sink=output.shard_sink)
                manifest = command(source, output.directory, chosen, run)
            summaries.show_decomposed(output.place, manifest)


@app.command(
    cls=SingleOptions,
    epilog=examples(
        "svdconvert train pissa -o trained --data rows.jsonl --eval-rows 64",
        "svdconvert train org/name -o out --method lora --rank 16 --data org/set",
        "svdconvert train bert -o out --task classify --data nyu-mll/glue:mrpc",
        "svdconvert train pissa -o trained --recipe recipe.yaml --lr 2e-4",
    ),
)
@with_options(PushOptions, into="pushing", panel="Publishing")
@with_options(SplitOptions, into="splitting", panel=NEW_ADAPTER, only=_OF_NEW_ADAPTER)
@with_options(TrainOptions)
def train(
    typed: Typed,
    splitting: Typed,
    pushing: Typed,
    model: ModelArg = None,
    out: OutOpt = None,
    base: BaseOpt = None,
    recipe: RecipeOpt = None,
    plan: TrainPlanOpt = False,
    overwrite: OverwriteOpt = False,
    threads: ThreadsOpt = None,
    trust_remote_code: TrustOpt = False,
    log_every: Annotated[
        int | None,
        option("--log-every", "N", "Leave a line with the losses after every N steps.", TRACKING, min=1),
    ] = None,
    push: PushOpt = None,
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Train the adapter of a decomposed directory, or a new adapter of a plain MODEL."""
    with report_errors(debug=debug, out=out, json=json):
        from svdconvert.commands.train import plan_train
        from svdconvert.commands.train import train as command
        from svdconvert.pipeline.effects import without_idle_seed
        from svdconvert.training.start import split_for

        configure_malloc_for_training()
        shared = read_recipe(recipe)
        source = required(model or shared.get("model"), "a MODEL")
        asked = options(SplitOptions, shared, splitting)
        if is_shared("seed", "decompose", shared):
            asked = without_idle_seed(asked)
        chosen = options(TrainOptions, shared, typed)
        settings = {"overwrite": overwrite, "threads": threads, "trust_remote_code": trust_remote_code}
        if plan:
            check_plan(out, push, pushing, shared, overwrite=overwrite)
            with progress.shown("train --plan") as track:
                run = run_settings(shared, track, **settings)
                split = split_for(source, asked, [spelled(name) for name in splitting], run.notify)
                estimate = plan_train(source, chosen, run, split=split, base=base)
            plan_summaries.show_train_plan(source, estimate)
            return
        with published(out, push, pushing, shared) as output:
            with progress.shown("train", log_every) as track:
                run = run_settings(shared, track, **settings)
                split = split_for(source, asked, [spelled(name) for name in splitting], run.notify)
                manifest = command(source, output.directory, chosen, run, split=split, base=base)
            summaries.show_trained(output.place, manifest)


@app.command(
    cls=SingleOptions,
    epilog=examples(
        "svdconvert convert RWKV-x060-World-1B6.pth -o hf --layout hf",
        "svdconvert convert RWKV-x060-World-1B6.pth --layout hf --plan",
    ),
)
@with_options(PushOptions, into="pushing", panel="Publishing")
@with_options(ConvertOptions)
def convert(
    typed: Typed,
    pushing: Typed,
    model: ModelArg = None,
    out: OutOpt = None,
    recipe: RecipeOpt = None,
    plan: PlanOpt = False,
    overwrite: OverwriteOpt = False,
    stream: StreamOpt = False,
    push: PushOpt = None,
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Write MODEL with the names of another layout, such as an RWKV-6 .pth for transformers, and back."""
    with report_errors(debug=debug, out=out, json=json):
        from svdconvert.commands.convert import convert as command
        from svdconvert.commands.convert import plan_convert

        shared = read_recipe(recipe)
        chosen = options(ConvertOptions, shared, typed)
        source = required(model or shared.get("model"), "a MODEL")
        if plan:
            check_plan(out, push, pushing, shared, overwrite=overwrite)
            plan_summaries.show_convert_plan(source, plan_convert(source, chosen))
            return
        with published(out, push, pushing, shared, stream=stream) as output:
            with progress.shown("convert") as track:
                run = run_settings(shared, track, overwrite=overwrite)
                run = replace(run, stream=stream, shard_sink=output.shard_sink)
                manifest = command(source, output.directory, chosen, run)
            summaries.show_converted(output.place, manifest)
