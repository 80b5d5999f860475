"""The commands about adapters: merge and to-lora."""

from dataclasses import replace

from svdconvert.cli import progress, summaries
from svdconvert.cli.application import app
from svdconvert.cli.arguments import (
    AdapterArg,
    BaseOpt,
    DebugOpt,
    DeviceOpt,
    InitOpt,
    OutOpt,
    OverwriteOpt,
    PlanOpt,
    RecipeOpt,
    ResidualOpt,
    StreamOpt,
    ThreadsOpt,
    run_settings,
)
from svdconvert.cli.errors import report_errors
from svdconvert.cli.options import SingleOptions, Typed, with_options
from svdconvert.cli.push_options import PushOpt, published, refuse_push_options
from svdconvert.config.options import LoraOptions, MergeOptions, PushOptions
from svdconvert.config.recipe import options, read_recipe


@app.command(
    cls=SingleOptions, epilog="Example: svdconvert merge trained -o merged --from base --push me/name-tuned"
)
@with_options(PushOptions, into="pushing", panel="Publishing")
@with_options(MergeOptions)
def merge(
    typed: Typed,
    pushing: Typed,
    adapter: AdapterArg,
    out: OutOpt = None,
    base: BaseOpt = None,
    residual: ResidualOpt = None,
    init: InitOpt = None,
    recipe: RecipeOpt = None,
    plan: PlanOpt = False,
    overwrite: OverwriteOpt = False,
    threads: ThreadsOpt = None,
    device: DeviceOpt = None,
    stream: StreamOpt = False,
    push: PushOpt = None,
    debug: DebugOpt = False,
) -> None:
    """Merge an adapter into its base or residual, as a plain checkpoint."""
    with report_errors(debug=debug, out=out):
        from svdconvert.commands.merge import merge as command
        from svdconvert.commands.merge import open_merge
        from svdconvert.inputs.sources import Sources

        shared = read_recipe(recipe)
        chosen = options(MergeOptions, shared, typed)
        if plan:
            refuse_push_options(push, pushing)
            sources = Sources(base=base, residual=residual, init=init, stream=True)
            summaries.show_merge_plan(adapter, open_merge(adapter, chosen, sources))
            return
        with published(out, push, pushing, stream=stream) as output:
            with progress.tensors("merge") as track:
                run = run_settings(shared, track, overwrite, threads, device)
                run = replace(run, stream=stream, shard_sink=output.shard_sink)
                manifest = command(
                    adapter, output.directory, chosen, run, base=base, residual=residual, init=init
                )
            summaries.show_merged(output.place, manifest)


@app.command(
    cls=SingleOptions,
    name="to-lora",
    epilog="Example: svdconvert to-lora peft-output -o lora --residual pissa",
)
@with_options(PushOptions, into="pushing", panel="Publishing")
@with_options(LoraOptions)
def to_lora(
    typed: Typed,
    pushing: Typed,
    adapter: AdapterArg,
    out: OutOpt = None,
    base: BaseOpt = None,
    residual: ResidualOpt = None,
    init: InitOpt = None,
    recipe: RecipeOpt = None,
    overwrite: OverwriteOpt = False,
    push: PushOpt = None,
    debug: DebugOpt = False,
) -> None:
    """Write the change made by training as a standard LoRA for the untouched base."""
    with report_errors(debug=debug, out=out):
        from svdconvert.commands.to_lora import to_lora as command

        shared = read_recipe(recipe)
        chosen = options(LoraOptions, shared, typed)
        with published(out, push, pushing) as output:
            with progress.tensors("to-lora", of_bytes=False) as track:
                run = run_settings(shared, track, overwrite, None, None)
                manifest = command(
                    adapter, output.directory, chosen, run, base=base, residual=residual, init=init
                )
            summaries.show_lora(output.place, manifest)
