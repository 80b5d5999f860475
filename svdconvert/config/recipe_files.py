"""Recipe files: those of the package by their names, and the data files that lie next to a recipe."""

from collections.abc import Mapping
from difflib import get_close_matches
from os.path import exists, normpath
from pathlib import Path
from typing import Any

from svdconvert.errors import RecipeError, brief

PACKAGED = Path(__file__).resolve().parents[1] / "recipes"
"""The folder of the recipes that are installed with the program."""
ENDING = ".yaml"
_DATA = {"train": ("data", "eval_data"), "eval": ("data",)}


def recipe_names() -> list[str]:
    """The names of the recipes of the package, sorted."""
    return sorted(path.stem for path in PACKAGED.glob(f"*{ENDING}"))


def find_recipe(path: Path) -> Path:
    """The file at `path`, or the recipe of the package with this name, with or without .yaml.

    Raises RecipeError, which suggests the nearest name.
    """
    if exists(path):
        return path
    names = recipe_names()
    name = path.name.removesuffix(ENDING)
    if len(path.parts) == 1 and name in names:
        return PACKAGED / f"{name}{ENDING}"
    if len(path.parts) == 1 and path.suffix not in (ENDING, ".yml"):
        nearest = get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise RecipeError(
            f"there is no file and no recipe {brief(name)}; {hint}svdconvert list recipes shows all"
        )
    raise RecipeError(
        f"{path} does not exist; give a YAML file, or a name that svdconvert list recipes shows"
    )


def with_neighbours(section: str, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The options of a section with the paths of data files that lie in the recipe's folder."""
    found = dict(options)
    for key in _DATA.get(section, ()):
        value = found.get(key)
        if isinstance(value, str):
            found[key] = _neighbour(value, folder)
        elif isinstance(value, list):
            found[key] = [_neighbour(one, folder) if isinstance(one, str) else one for one in value]
    return found


def _neighbour(data: str, folder: Path) -> str:
    """The path of a data file in the recipe's folder, if `data` names one; else `data`."""
    path = folder / data
    try:
        return normpath(path) if path.is_file() and not Path(data).is_absolute() else data
    except (OSError, ValueError):  # too long, or with a null character
        return data
