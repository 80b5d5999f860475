"""What `svdconvert list recipes` shows: the recipes of the package."""

from itertools import takewhile
from pathlib import Path
from typing import Any

from svdconvert.config.options import SplitOptions
from svdconvert.config.recipe import options, read_recipe, variants_of
from svdconvert.config.recipe_files import ENDING, PACKAGED, recipe_names


def recipes() -> list[dict[str, Any]]:
    """One row for each recipe of the package, in the order of their names."""
    return [_row(name) for name in recipe_names()]


def _row(name: str) -> dict[str, Any]:
    path = PACKAGED / f"{name}{ENDING}"
    runs = [recipe for _, recipe in variants_of(read_recipe(path), {})]
    tasks = runs[0].sections["eval"].get("tasks", "")
    return {
        "recipe": name,
        "about": _comment(path),
        "model": str(runs[0].get("model")),
        "method": ", ".join(dict.fromkeys(options(SplitOptions, recipe, {}).method for recipe in runs)),
        "tasks": tasks.split(",") if isinstance(tasks, str) and tasks else list(tasks),
    }


def _comment(path: Path) -> str:
    """The comment at the top of a recipe, as one line."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in lines)
