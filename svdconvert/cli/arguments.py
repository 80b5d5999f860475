"""The arguments and options that several commands share, and the run's settings made from them."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from svdconvert.cli.answers import notify
from svdconvert.cli.option_groups import GENERAL, INPUTS, MEMORY, SAVING
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


def option(spelling: str, metavar: str | None, sentence: str, group: str, **others: Any) -> Any:
    """An option as `--help` shows it: spelling, name of its value (None for a flag), sentence, heading."""
    names = spelling.split(", ")
    return typer.Option(
        *names, metavar=metavar, help=sentence, rich_help_panel=group, show_default=False, **others
    )


StreamOpt = Annotated[
    bool,
    option(
        "--stream",
        None,
        "Store no weights on disk: read them from the Hub; with --push, upload every finished shard.",
        MEMORY,
    ),
]
ReadOnlyStreamOpt = Annotated[
    bool, option("--stream", None, "Store no weights on disk: read them from the Hub.", MEMORY)
]
OutOpt = Annotated[
    Path | None,
    option("-o, --out", "DIR", "The directory to write; it appears complete or not at all.", SAVING),
]
OverwriteOpt = Annotated[
    bool, option("--overwrite", None, "Replace an output directory that svdconvert wrote.", SAVING)
]
ThreadsOpt = Annotated[
    int | None,
    option("--threads", "N", "Number of threads; the same number gives the same bytes.", MEMORY, min=1),
]
DeviceOpt = Annotated[
    str | None, option("--device", "DEVICE", "Device that computes: auto, cpu, cuda or cuda:N.", MEMORY)
]
BaseOpt = Annotated[
    str | None, option("--base", "MODEL", "The base's location, if it differs from the manifest's.", INPUTS)
]
ResidualOpt = Annotated[
    str | None,
    option(
        "--residual",
        "DIR",
        "The decomposed directory, or another residual, of an adapter that was trained elsewhere.",
        INPUTS,
    ),
]
InitOpt = Annotated[
    str | None,
    option("--init", "ADAPTER|none", "The adapter before training, or none if it started at zero.", INPUTS),
]
ConfigOpt = Annotated[
    Path | None,
    option(
        "--config", "FILE", "A file in mergekit's YAML that says which checkpoints are merged how.", INPUTS
    ),
]
RecipeOpt = Annotated[
    Path | None,
    option("--recipe", "FILE", "A YAML file of options; options on the command line override it.", GENERAL),
]
PlanOpt = Annotated[
    bool,
    option("--plan", None, "Write nothing; print what would be done, by reading headers only.", GENERAL),
]
TrainPlanOpt = Annotated[
    bool,
    option(
        "--plan", None, "Write nothing; print what would be done, from headers and the encoded rows.", GENERAL
    ),
]
LoraPlanOpt = Annotated[
    bool,
    option("--plan", None, "Write nothing; print what would be done, and the error of each rank.", GENERAL),
]
JsonOpt = Annotated[bool, option("--json", None, "Print one JSON document instead of tables.", GENERAL)]
TrustOpt = Annotated[
    bool,
    option("--trust-remote-code", None, "Let transformers run the code in the model's repository.", GENERAL),
]
DebugOpt = Annotated[bool, option("--debug", None, "Show the traceback of an error.", GENERAL)]


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
