"""The arguments and options that several commands share, and the run's settings made from them."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from svdconvert.cli.terminal import notify
from svdconvert.config.execution import Run
from svdconvert.config.progress import Track
from svdconvert.config.ranks import find_ranks
from svdconvert.config.recipe import Recipe

T = TypeVar("T")

ModelArg = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A model directory, a .pth file, or org/name[@revision]."),
]
AdapterArg = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="A directory of decompose or train, or any LoRA in PEFT's format; local or on the Hub.",
    ),
]
InputsArg = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUT...", help="Adapters of one base, or checkpoints of one shape; local or on the Hub."
    ),
]
AdaptersArg = Annotated[
    list[str],
    typer.Argument(
        metavar="ADAPTER...",
        help="Directories of decompose or train, or any LoRAs in PEFT's format; local or on the Hub.",
    ),
]
DirArg = Annotated[
    str, typer.Argument(metavar="DIR", help="A directory that svdconvert wrote, local or on the Hub.")
]
StreamOpt = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Store no weights on disk: read them from the Hub; with --push, upload every finished shard.",
    ),
]
ReadOnlyStreamOpt = Annotated[
    bool, typer.Option("--stream", help="Store no weights on disk: read them from the Hub.")
]
OutOpt = Annotated[
    Path | None,
    typer.Option("-o", "--out", help="The directory to write; it appears complete or not at all."),
]
RecipeOpt = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        help="A YAML file of options, or a name from svdconvert list recipes; typed options override it.",
    ),
]
PlanOpt = Annotated[
    bool, typer.Option("--plan", help="Write nothing; print what would be done, by reading headers only.")
]
OverwriteOpt = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output directory that svdconvert wrote.")
]
ThreadsOpt = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Number of threads; the same number gives the same bytes."),
]
DeviceOpt = Annotated[
    str | None, typer.Option("--device", help="Device that computes: auto, cpu, cuda or cuda:N.")
]
TrustOpt = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let transformers run the code in the model's repository.")
]
DebugOpt = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
BaseOpt = Annotated[
    str | None, typer.Option("--base", help="The base's location, if it differs from the manifest's.")
]
ResidualOpt = Annotated[
    str | None,
    typer.Option(
        "--residual",
        help="The decomposed directory, or another residual, of an adapter that was trained elsewhere.",
    ),
]
InitOpt = Annotated[
    str | None,
    typer.Option("--init", help="The adapter before training, or none if it started at zero."),
]

ConfigOpt = Annotated[
    Path | None,
    typer.Option("--config", help="A file in mergekit's YAML that says which checkpoints are merged how."),
]


def required(value: T | None, what: str) -> T:
    """The value. Raises BadParameter if it is None."""
    if value is None:
        raise typer.BadParameter(f"{what} is missing")
    return value


def run_settings(shared: Recipe, track: Track | None, **settings: Any) -> Run:
    """The run's settings: from the command line, else from the recipe."""
    given = {name: value for name, value in settings.items() if value is not None}
    recipe = {name: shared.get(name) for name in ("threads", "device") if shared.get(name)}
    return Run(**recipe | given, ranks=find_ranks(), track=track or Run().track, notify=notify)
