"""What a manifest measures of every matrix, as grids of layers and roles."""

import re
from collections.abc import Iterable, Mapping
from math import isfinite

from svdconvert.manifest.results import LoraResult, MergeResult
from svdconvert.manifest.schema import Manifest
from svdconvert.models.roles import role_of

Grid = Mapping[tuple[int, str], float]
"""(layer, role) -> value: the mean over the matrices there, such as those of the experts of a layer."""

ENERGY = "share of the base in the adapter"
ERROR = "relative error as stored"
KEPT = "share of the update kept by rounding"
CUT = "relative error of the truncation"
REDUCED = "share by which the error in 4 bits is below that of plain NF4"
EXTRACTED = "share of the change that the LoRA leaves out"
_LAYER = re.compile(r"(?:^|\.)([0-9]{1,6})\.")
_SUFFIXES = (".weight", ".bias")


def grids_of(manifest: Manifest) -> dict[str, Grid]:
    """What was measured by matrix: title -> grid. Grids without a value, or without layers, are left out."""
    matrices = manifest.matrices.items()
    result = manifest.result
    found = {
        ENERGY: _grid((name, matrix.role, matrix.energy) for name, matrix in matrices),
        ERROR: _grid((name, matrix.role, matrix.error) for name, matrix in matrices),
        REDUCED: _grid(
            (name, matrix.role, matrix.quantised.reduction) for name, matrix in matrices if matrix.quantised
        ),
    }
    if isinstance(result, MergeResult) and result.update is not None:
        update = result.update.matrices.items()
        found[KEPT] = _grid((name, None, kept.kept) for name, kept in update)
    if isinstance(result, LoraResult) and result.truncation is not None:
        cut = result.truncation.modules.items()
        found[CUT] = _grid((name, None, module.error) for name, module in cut)
    if isinstance(result, LoraResult) and result.extracted is not None:
        extracted = result.extracted.modules.items()
        found[EXTRACTED] = _grid((name, None, module.error) for name, module in extracted)
    return {title: grid for title, grid in found.items() if grid and any(grid.values())}


def by_role_and_layer(grids: Mapping[str, Grid]) -> dict[str, dict[str, dict[int, float]]]:
    """The same as title -> role -> layer -> value, which JSON can hold; roles and layers are sorted."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for title, grid in grids.items():
        rows: dict[str, dict[int, float]] = {role: {} for role in sorted({role for _, role in grid})}
        for layer, role in sorted(grid):
            rows[role][layer] = grid[layer, role]
        found[title] = rows
    return found


def place_of(name: str) -> tuple[int, str] | None:
    """(layer, role) of a tensor or module by its name; None if the name has no number of a layer."""
    found = _LAYER.search(name)
    if found is None:
        return None
    path = name[found.end() :]
    for suffix in _SUFFIXES:
        path = path.removesuffix(suffix)
    return int(found[1]), role_of(path)


def _grid(values: Iterable[tuple[str, str | None, float | None]]) -> Grid:
    """From (name, its role if it is known, value)."""
    cells: dict[tuple[int, str], list[float]] = {}
    for name, role, value in values:
        place = place_of(name)
        if place is not None and value is not None and isfinite(value):
            cells.setdefault((place[0], role or place[1]), []).append(value)
    return {place: sum(members) / len(members) for place, members in cells.items()}
