"""The command run: a whole recipe, from the model to the scores and the report."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from svdconvert.cli import progress, run_summaries
from svdconvert.cli.answers import tell_rows
from svdconvert.cli.application import app
from svdconvert.cli.arguments import (
    DebugOpt,
    DeviceOpt,
    JsonOpt,
    ThreadsOpt,
    TrustOpt,
    option,
    required,
    run_settings,
)
from svdconvert.cli.errors import report_errors
from svdconvert.cli.help import examples
from svdconvert.cli.option_groups import EVALUATION, INPUTS, RESULT, SAVING
from svdconvert.cli.options import SingleOptions
from svdconvert.cli.process import configure_malloc_for_training
from svdconvert.config.recipe import read_recipe
from svdconvert.errors import RecipeError, brief


@app.command(
    cls=SingleOptions,
    epilog=examples(
        "svdconvert run arithmetic-smollm2 -o sums --model smollm2",
        "svdconvert run recipe.yaml -o results --set train.steps=2",
    ),
)
def run(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A recipe's file, or a name that svdconvert list recipes shows."
        ),
    ],
    out: Annotated[
        Path | None, option("-o, --out", "DIR", "The directory of all results; it is continued.", SAVING)
    ] = None,
    model: Annotated[
        str | None, option("--model", "MODEL", "Another model than the recipe's.", INPUTS)
    ] = None,
    changes: Annotated[
        list[str] | None,
        option(
            "--set",
            "KEY=VALUE",
            "Another value than the recipe's, such as train.steps=2; may be given several times.",
            RESULT,
        ),
    ] = None,
    run_code: Annotated[
        bool,
        option("--run-code", None, "Run the programs that the model writes for tasks of code.", EVALUATION),
    ] = False,
    overwrite: Annotated[
        bool, option("--overwrite", None, "Start again, in a directory that another run wrote.", SAVING)
    ] = False,
    threads: ThreadsOpt = None,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Perform all steps of RECIPE: decompose, train, merge, to-lora, eval and report."""
    with report_errors(debug=debug, json=json):
        from svdconvert.workflow.run import run as command

        directory = required(out, "-o DIR")
        configure_malloc_for_training()
        shared = read_recipe(Path(recipe))
        with progress.shown("run") as track:
            settings = {"overwrite": overwrite, "threads": threads, "device": device}
            execution = run_settings(shared, track, **settings, trust_remote_code=trust_remote_code)
            given = [*(changes or []), *(["eval.run_code=true"] if run_code else [])]
            found = command(recipe, directory, execution, changes=_changes(given, model))
        tell_rows([asdict(one) for one in found])
        run_summaries.show_outcomes(directory, found)


def _changes(given: list[str], model: str | None) -> Mapping[str, Any]:
    """ "train.steps=2" as {"train": {"steps": 2}}. Raises RecipeError for what has another form."""
    import yaml

    found: dict[str, Any] = {} if model is None else {"model": model}
    for text in given:
        key, equals, value = text.partition("=")
        parts = key.strip().replace("-", "_").split(".")
        if not equals or len(parts) > 2 or not all(parts):
            raise RecipeError(f"--set {text}: write it as KEY=VALUE or SECTION.OPTION=VALUE")
        try:
            read = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2024-99-99
            raise RecipeError(
                f"--set {brief(text)}: {brief(value)} cannot be read as a YAML value"
            ) from error
        place = found.setdefault(parts[0], {}) if len(parts) == 2 else found
        if not isinstance(place, dict) or parts[-1] in place:
            raise RecipeError(f"--set {text}: {key} is given twice; give it once")
        place[parts[-1]] = read
    return found
