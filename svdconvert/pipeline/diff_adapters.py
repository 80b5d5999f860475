"""diff of two adapters: norms, cosines and principal angles of their changes, from the factors alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot

from svdconvert.config.display import Shown
from svdconvert.config.execution import Run
from svdconvert.config.progress import report
from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.recover_init import lost_init
from svdconvert.linalg.subspaces import Relation, relate
from svdconvert.pipeline.lora_plan import exact_factors

_LAYER = re.compile(r"\.([0-9]{1,6})\.")


@dataclass(frozen=True, slots=True)
class ModuleDiff:
    """The changes that two adapters make to one module."""

    module: str
    relation: Relation


@dataclass(frozen=True, repr=False)
class AdapterDiff(Shown):
    """The comparison of two adapters."""

    first: str
    second: str
    modules: list[ModuleDiff]
    """The modules that both adapt."""
    only_first: list[str]
    only_second: list[str]
    norms: tuple[float, float]
    """||change||_F over the common modules."""
    cosine: float | None
    """Between the two changes, over the common modules."""
    parameters: list[str]
    """Parameters trained in full by either, which are not compared."""

    def shown_as(self) -> Mapping[str, object]:
        """How many modules both adapt, and how alike the changes are."""
        return {
            "first": self.first,
            "second": self.second,
            "modules": len(self.modules),
            "only first": len(self.only_first) or None,
            "only second": len(self.only_second) or None,
            "cosine": self.cosine,
            "norms": self.norms,
        }

    def cells(self) -> dict[tuple[int, str], float]:
        """(layer, role) -> ||second - first|| / ||first||; a role is a path after the layer's number."""
        found = {}
        for one in self.modules:
            layer = _LAYER.search(one.module)
            if layer and one.relation.norms[0]:
                place = int(layer[1]), one.module[layer.end() :]
                found[place] = one.relation.distance / one.relation.norms[0]
        return found


def compare_adapters(first: AdapterDelta, second: AdapterDelta, run: Run) -> AdapterDiff:
    """Compare two adapters, one module at a time.

    Raises ArtifactError if they have no module in common, if shapes differ, or if an adapter started as a
    part of its base and its start is not stored.
    """
    for delta in (first, second):
        if delta.is_lost:
            raise lost_init(delta)
    common = [module for module in first.modules if module in second.adapter.modules]
    if not common:
        raise ArtifactError(
            f"{first.directory} and {second.directory} adapt no module in common; give adapters of one model"
        )
    found = []
    for done, module in enumerate(common, 1):
        _refuse_shapes(first, second, module)
        found.append(ModuleDiff(module, relate(exact_factors(first, module), exact_factors(second, module))))
        report(None, done, len(common), "modules", name=module)
    norms = hypot(*(one.relation.norms[0] for one in found)), hypot(*(one.relation.norms[1] for one in found))
    along = sum((one.relation.cosine or 0.0) * one.relation.norms[0] * one.relation.norms[1] for one in found)
    return AdapterDiff(
        first=str(first.directory),
        second=str(second.directory),
        modules=found,
        only_first=[module for module in first.modules if module not in second.adapter.modules],
        only_second=[module for module in second.modules if module not in first.adapter.modules],
        norms=norms,
        cosine=along / (norms[0] * norms[1]) if all(norms) else None,
        parameters=sorted({*first.adapter.extras, *second.adapter.extras}),
    )


def _refuse_shapes(first: AdapterDelta, second: AdapterDelta, module: str) -> None:
    for piece, side in (("lora_B", 0), ("lora_A", 1)):
        one, other = (delta.adapter.shape(module, piece)[side] for delta in (first, second))
        if one != other:
            what = "rows" if side == 0 else "columns"
            raise ArtifactError(
                f"{module} has {one} {what} in {first.directory} and {other} in {second.directory}; give "
                "adapters of one model"
            )
