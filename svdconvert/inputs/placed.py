"""The matrices of experts that an adapter's model has, and their names in both forms of an adapter."""

from collections.abc import Iterator
from dataclasses import dataclass

from svdconvert.checkpoint.parts import part_name
from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.model import OpenModel, find_model
from svdconvert.inputs.sources import Sources
from svdconvert.layouts.base import LAYOUTS, Layout, Slot
from svdconvert.manifest.place import Place, Rows


@dataclass(frozen=True, slots=True)
class Projection:
    """A projection of an expert, which has factors of its own in an adapter for single experts."""

    module: str
    """Its name there."""
    parameter: str
    """The parameter at run time that it is a part of."""
    expert: int
    rows: Rows | None
    """Its rows in the expert's matrix of that parameter; None if it is all of it."""

    @property
    def stacked(self) -> str:
        """The name of the expert's factors in an adapter for the parameter."""
        return part_name(self.parameter, self.expert)


@dataclass(frozen=True)
class ExpertNames:
    """The experts of a model."""

    projections: tuple[Projection, ...]
    fused_by_peft: bool
    """True if PEFT turns factors of single experts into those of parameters."""


def projections_of(module: str, place: Place, rows: int) -> Iterator[Projection]:
    """The projections that a stored matrix with `rows` out features is, or combines."""
    if place.expert is None:
        return
    holder = module.rpartition(".")[0]
    if not place.projections:
        yield Projection(module, place.parameter, place.expert, place.rows)
    for number, name in enumerate(place.projections):
        yield Projection(f"{holder}.{name}", place.parameter, place.expert, place.rows_of(number, rows))


def expert_names(delta: AdapterDelta, sources: Sources) -> ExpertNames:
    """The experts of the adapter's model, from the manifest or from the headers of the model.

    `sources` has the model's location if the user gave it. Raises ArtifactError if neither suffices.
    """
    known = tuple(known_projections(delta))
    name = delta.layout_name
    if known and name in LAYOUTS.names():
        experts = LAYOUTS.get(name).experts
        return ExpertNames(known, experts is not None and experts.fused_by_peft)
    origin = delta.manifest.base if delta.manifest else None
    model = find_model(origin, sources.base, stream=True, trust_remote_code=sources.trust_remote_code)
    if model is not None:
        return _of_model(model, model.layout(name)[1])
    if not known:
        raise ArtifactError(
            f"{delta.directory} does not say how its model names experts; give the model with --base"
        )
    return ExpertNames(known, fused_by_peft=False)


def known_projections(delta: AdapterDelta) -> Iterator[Projection]:
    """The projections of experts among the matrices of the adapter's manifest."""
    for matrix in delta.manifest.matrices.values() if delta.manifest else ():
        if matrix.place is not None:
            yield from projections_of(matrix.module, matrix.place, matrix.shape[0])


def _of_model(model: OpenModel, layout: Layout) -> ExpertNames:
    infos = layout.divided(model.source).infos
    found = [
        projection
        for name, slot in layout.slots(infos).items()
        if slot.place is not None
        for projection in projections_of(slot.module, slot.place, _rows(slot, infos[name].shape))
    ]
    return ExpertNames(tuple(found), layout.experts is not None and layout.experts.fused_by_peft)


def _rows(slot: Slot, shape: tuple[int, ...]) -> int:
    return shape[1] if slot.place is not None and slot.place.transposed else shape[0]
