"""The command line: each command reads its options, calls one function and prints one summary or error.

Commands are imported when they run, so that `--help` imports no torch.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from svdconvert.cli import progress, summaries
from svdconvert.cli.arguments import (
    AdapterArg,
    BaseOpt,
    DebugOpt,
    DeviceOpt,
    DirArg,
    InitOpt,
    JsonOpt,
    ModelArg,
    OutOpt,
    OverwriteOpt,
    PlanOpt,
    RecipeOpt,
    ResidualOpt,
    StreamOpt,
    ThreadsOpt,
    TrustOpt,
)
from svdconvert.cli.errors import report_errors
from svdconvert.cli.options import Commands, SingleOptions, Typed, with_options
from svdconvert.cli.process import configure_malloc_for_training
from svdconvert.cli.push_options import PushOpt, published, refuse_push_options
from svdconvert.cli.terminal import as_json, notify
from svdconvert.config.execution import Run
from svdconvert.config.options import ConvertOptions, LoraOptions, MergeOptions, PushOptions, SplitOptions
from svdconvert.config.progress import Track
from svdconvert.config.ranks import find_ranks
from svdconvert.config.recipe import Recipe, options, read_recipe
from svdconvert.config.train import TrainOptions
from svdconvert.version import __version__

T = TypeVar("T")

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
    stream: StreamOpt = False,
    push: PushOpt = None,
    debug: DebugOpt = False,
) -> None:
    """Split the target matrices of MODEL into a residual base and an initial adapter."""
    with report_errors(debug=debug, out=out):
        from svdconvert.commands.decompose import decompose as command
        from svdconvert.commands.decompose import plan_decompose

        shared = read_recipe(recipe)
        chosen = options(SplitOptions, shared, typed)
        source = _required(model or shared.get("model"), "a MODEL")
        if plan:
            refuse_push_options(push, pushing)
            summaries.show_estimate(source, plan_decompose(source, chosen))
            return
        with published(out, push, pushing, stream=stream) as output:
            with progress.tensors("decompose") as track:
                run = _run(shared, track, overwrite, threads, device)
                run = replace(run, stream=stream, shard_sink=output.shard_sink)
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
    push: PushOpt = None,
    debug: DebugOpt = False,
) -> None:
    """Train the adapter of a decomposed directory, or a new adapter of a plain MODEL."""
    with report_errors(debug=debug, out=out):
        from svdconvert.commands.train import train as command
        from svdconvert.training.start import split_for

        configure_malloc_for_training()
        shared = read_recipe(recipe)
        source = _required(model or shared.get("model"), "a MODEL")
        given = {name: value for name, value in (("method", method), ("rank", rank)) if value is not None}
        asked = options(SplitOptions, shared, given)
        chosen = options(TrainOptions, shared, typed)
        run = replace(_run(shared, None, overwrite, threads, None), trust_remote_code=trust_remote_code)
        split = split_for(source, asked, [f"--{name}" for name in given], run.notify)
        with published(out, push, pushing) as output:
            with progress.steps() as watch:
                manifest = command(source, output.directory, chosen, run, split=split, base=base, watch=watch)
            summaries.show_trained(output.place, manifest)


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
                run = _run(shared, track, overwrite, threads, device)
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
                run = _run(shared, track, overwrite, None, None)
                manifest = command(
                    adapter, output.directory, chosen, run, base=base, residual=residual, init=init
                )
            summaries.show_lora(output.place, manifest)


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
        source = _required(model or shared.get("model"), "a MODEL")
        with published(out, push, pushing, stream=stream) as output:
            with progress.tensors("convert") as track:
                run = _run(shared, track, overwrite, None, None)
                run = replace(run, stream=stream, shard_sink=output.shard_sink)
                manifest = command(source, output.directory, chosen, run)
            summaries.show_converted(output.place, manifest)


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


def _required(value: T | None, what: str) -> T:
    if value is None:
        raise typer.BadParameter(f"{what} is missing")
    return value


def _run(
    shared: Recipe, track: Track | None, overwrite: bool, threads: int | None, device: str | None
) -> Run:
    """The run's settings: from the command line, else from the recipe."""
    defaults = Run()
    return Run(
        overwrite=overwrite,
        threads=threads or shared.get("threads"),
        device=device or shared.get("device") or defaults.device,
        ranks=find_ranks(),
        track=track or defaults.track,
        notify=notify,
    )
