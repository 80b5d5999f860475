"""The commands about adapters: merge, to-lora and combine."""

from dataclasses import replace
from typing import Any

from svdconvert.cli import combine_summaries, lora_summaries, plan_summaries, progress, summaries
from svdconvert.cli.application import app
from svdconvert.cli.arguments import (
    AdapterArg,
    AdaptersArg,
    BaseOpt,
    ConfigOpt,
    DebugOpt,
    DeviceOpt,
    InitOpt,
    InputsArg,
    JsonOpt,
    LoraPlanOpt,
    OutOpt,
    OverwriteOpt,
    PlanOpt,
    RecipeOpt,
    ResidualOpt,
    StreamOpt,
    ThreadsOpt,
    TrustOpt,
    run_settings,
)
from svdconvert.cli.errors import report_errors
from svdconvert.cli.help import examples
from svdconvert.cli.options import SingleOptions, Typed, with_options
from svdconvert.cli.push_options import PushOpt, check_plan, published
from svdconvert.config.combine import CombineOptions
from svdconvert.config.options import LoraOptions, MergeOptions, PushOptions
from svdconvert.config.recipe import options, read_recipe


@app.command(
    cls=SingleOptions,
    epilog=examples(
        "svdconvert merge trained -o merged",
        "svdconvert merge trained -o merged --from base --push me/name-tuned",
        "svdconvert merge math code -o both --weights 0.7,0.3 --plan",
    ),
)
@with_options(PushOptions, into="pushing", panel="Publishing")
@with_options(MergeOptions)
def merge(
    typed: Typed,
    pushing: Typed,
    adapters: AdaptersArg,
    out: OutOpt = None,
    base: BaseOpt = None,
    residual: ResidualOpt = None,
    init: InitOpt = None,
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
    """Merge an adapter into its base or residual, or several into their base, as a plain checkpoint."""
    with report_errors(debug=debug, out=out, json=json):
        from svdconvert.commands.merge import merge as command
        from svdconvert.commands.merge import open_merge
        from svdconvert.inputs.sources import Sources
        from svdconvert.pipeline.merge_group import open_group_merge

        shared = read_recipe(recipe)
        chosen = options(MergeOptions, shared, typed)
        if plan:
            check_plan(out, push, pushing, shared, overwrite=overwrite)
            sources = Sources(
                base=base, residual=residual, init=init, stream=True, trust_remote_code=trust_remote_code
            )
            if len(adapters) > 1 or chosen.weights is not None:
                plan_summaries.show_group_plan(open_group_merge(adapters, chosen, sources))
            else:
                plan_summaries.show_merge_plan(adapters[0], open_merge(adapters[0], chosen, sources))
            return
        with published(out, push, pushing, shared, stream=stream) as output:
            with progress.shown("merge") as track:
                settings = {"overwrite": overwrite, "threads": threads, "device": device, "stream": stream}
                run = run_settings(shared, track, **settings)
                run = replace(run, trust_remote_code=trust_remote_code, shard_sink=output.shard_sink)
                manifest = command(
                    adapters, output.directory, chosen, run, base=base, residual=residual, init=init
                )
            summaries.show_merged(output.place, manifest)


@app.command(
    cls=SingleOptions,
    name="to-lora",
    epilog=examples(
        "svdconvert to-lora trained -o lora",
        "svdconvert to-lora trained -o lora --plan",
        "svdconvert to-lora trained -o lora --rank 16",
        "svdconvert to-lora peft-output -o lora --residual pissa",
    ),
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
    plan: LoraPlanOpt = False,
    overwrite: OverwriteOpt = False,
    trust_remote_code: TrustOpt = False,
    push: PushOpt = None,
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Write the change made by training as a standard LoRA for the untouched base."""
    with report_errors(debug=debug, out=out, json=json):
        from svdconvert.commands.to_lora import plan_to_lora
        from svdconvert.commands.to_lora import to_lora as command

        shared = read_recipe(recipe)
        chosen = options(LoraOptions, shared, typed)
        places = {"base": base, "residual": residual, "init": init}
        if plan:
            check_plan(out, push, pushing, shared, overwrite=overwrite)
            with progress.shown("to-lora --plan") as track:
                run = run_settings(shared, track, trust_remote_code=trust_remote_code)
                estimate = plan_to_lora(adapter, chosen, run, **places)
            plan_summaries.show_lora_plan(adapter, estimate)
            return
        with published(out, push, pushing, shared) as output:
            with progress.shown("to-lora") as track:
                run = run_settings(shared, track, overwrite=overwrite, trust_remote_code=trust_remote_code)
                manifest = command(adapter, output.directory, chosen, run, **places)
            lora_summaries.show_lora(output.place, manifest)


@app.command(
    cls=SingleOptions,
    epilog=examples(
        "svdconvert combine math code -o both --weights 0.7,0.3 --plan",
        "svdconvert combine math code -o both --method ties --density 0.5",
    ),
)
@with_options(PushOptions, into="pushing", panel="Publishing")
@with_options(CombineOptions)
def combine(
    typed: Typed,
    pushing: Typed,
    inputs: InputsArg = None,
    out: OutOpt = None,
    config: ConfigOpt = None,
    base: BaseOpt = None,
    residual: ResidualOpt = None,
    init: InitOpt = None,
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
    """Merge several adapters into one LoRA, or several checkpoints into one checkpoint."""
    with report_errors(debug=debug, out=out, json=json):
        from svdconvert.commands.combine import combine as command
        from svdconvert.commands.combine import plan_combine

        shared = read_recipe(recipe)
        chosen = options(CombineOptions, shared, typed)
        places: dict[str, Any] = {"base": base, "residual": residual, "init": init, "config": config}
        if plan:
            check_plan(out, push, pushing, shared, overwrite=overwrite)
            with progress.shown("combine --plan") as track:
                run = run_settings(shared, track, stream=stream, trust_remote_code=trust_remote_code)
                plan_summaries.show_combine_plan(plan_combine(inputs or [], chosen, run, **places))
            return
        with published(out, push, pushing, shared, stream=stream) as output:
            with progress.shown("combine") as track:
                settings = {"overwrite": overwrite, "threads": threads, "device": device, "stream": stream}
                settings |= {"trust_remote_code": trust_remote_code}
                run = replace(run_settings(shared, track, **settings), shard_sink=output.shard_sink)
                manifest = command(inputs or [], output.directory, chosen, run, **places)
            combine_summaries.show_combined(output.place, manifest)
