"""diff: where and how much two checkpoints differ, one tensor at a time."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, isfinite, sqrt

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import REAL
from svdconvert.config.display import Shown
from svdconvert.config.execution import Run
from svdconvert.config.progress import report
from svdconvert.errors import ArtifactError, TargetError, UnknownNameError
from svdconvert.inputs.config_differences import differing_settings
from svdconvert.inputs.model_pair import Difference, ModelPair
from svdconvert.layouts.base import Slot
from svdconvert.linalg.blocks import total_energy
from svdconvert.linalg.spectrum import effective_rank, rank_for_energy, squares_of, stable_rank
from svdconvert.linalg.threads import float32_products, pick_device, use_threads

OTHERS = "others"
"""The role of tensors that are no matrix of a repeated block."""


@dataclass(frozen=True, slots=True)
class Spectral:
    """The spectrum of a change, in numbers."""

    stable_rank: float
    """||change||_F^2 / sigma_1^2."""
    effective_rank: float
    """exp of the entropy of sigma^2 / ||change||_F^2."""
    rank_90: int
    """The smallest rank that holds 90 % of ||change||_F^2."""
    rank_99: int


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """How much one tensor differs. A value that does not exist for its element type is None."""

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    moved: float
    """The share of the entries whose values differ."""
    norm: float | None = None
    """||first||_F."""
    change: float | None = None
    """||second - first||_F."""
    cosine: float | None = None
    """Between the two tensors; None if one is zero."""
    spectral: Spectral | None = None
    """Of the change, if the tensor is a matrix of a repeated block and changed."""

    @property
    def relative(self) -> float | None:
        """||second - first||_F / ||first||_F."""
        return self.change / self.norm if self.norm and self.change is not None else None


@dataclass(frozen=True, slots=True)
class GroupDiff:
    """The tensors of one role, or all, together."""

    role: str
    tensors: int
    changed: int
    moved: float
    relative: float | None
    cosine: float | None
    """The smallest of a tensor."""
    stable_rank: float | None
    """Mean over the matrices that changed; so are the others."""
    effective_rank: float | None
    rank_90: float | None
    rank_99: float | None


@dataclass(frozen=True, repr=False)
class ModelDiff(Shown):
    """The comparison of two checkpoints."""

    first: str
    second: str
    tensors: list[TensorDiff]
    """In the order of the first checkpoint."""
    mismatches: list[str]
    """Tensors without a counterpart of the same shape, one sentence each."""
    equal_files: int
    """Tensors that are known to be equal by the checksums of their files, and were not read."""

    def shown_as(self) -> Mapping[str, object]:
        """How many tensors changed, and by how much all together."""
        everything = self.groups()[-1]
        return {
            "first": self.first,
            "second": self.second,
            "tensors": len(self.tensors),
            "changed": everything.changed,
            "relative": everything.relative,
            "mismatches": len(self.mismatches) or None,
        }

    def cells(self) -> dict[tuple[int, str], float]:
        """(layer, role) -> ||second - first|| / ||first||, over the matrices of the repeated blocks."""
        sums: dict[tuple[int, str], tuple[float, float]] = {}
        for one in self.tensors:
            if one.layer is not None and one.norm is not None:
                change, norm = sums.get((one.layer, one.role), (0.0, 0.0))
                sums[one.layer, one.role] = hypot(change, one.change or 0.0), hypot(norm, one.norm)
            elif one.layer is not None:
                sums.setdefault((one.layer, one.role), (0.0, 0.0))
        return {place: change / norm if norm else 0.0 for place, (change, norm) in sums.items()}

    def groups(self) -> list[GroupDiff]:
        """By role, and all together at the end."""
        by_role: dict[str, list[TensorDiff]] = defaultdict(list)
        for tensor in self.tensors:
            by_role[tensor.role].append(tensor)
        rows = [_group(role, members) for role, members in by_role.items()]
        return [*sorted(rows, key=lambda row: row.role == OTHERS), _group("all", self.tensors)]


def compare_models(pair: ModelPair, run: Run) -> ModelDiff:
    """Read both checkpoints once and compare them. Raises ArtifactError if they have no tensor in common."""
    use_threads(run.threads)
    if settings := differing_settings(*pair.models):
        run.notify(
            f"config.json of {pair.base.path} and of {pair.tuned.path} differ in {settings}: the models "
            "differ in more than their weights"
        )
    pair, slots = _divided(pair)
    common = pair.common()
    if not common:
        raise ArtifactError(
            f"{pair.base.path} and {pair.tuned.path} have no tensor in common; give two checkpoints of "
            "one model"
        )
    difference = Difference(pair)
    found = []
    with float32_products():
        for done, name in enumerate(common, 1):
            slot = slots.get(name)
            if name in pair.equal:
                found.append(_equal(name, slot, common[name].shape))
            else:
                found.append(_compare(difference, name, slot, run))
            report(None, done, len(common), "tensors", name=name)
    first, second = (model.snapshot.name for model in pair.models)
    mismatches = [*pair.mismatches().values()]
    return ModelDiff(first, second, found, mismatches, len(pair.equal & common.keys()))


def _divided(pair: ModelPair) -> tuple[ModelPair, dict[str, Slot]]:
    """(the pair, divided as its layout has it, and the matrices whose roles are known).

    No role is known of a checkpoint of an unknown layout.
    """
    try:
        layout = pair.base.layout()[1]
    except UnknownNameError:
        return pair, {}
    pair = pair.divided(layout)
    return pair, layout.slots(pair.base.source.infos)


def _equal(name: str, slot: Slot | None, shape: tuple[int, ...]) -> TensorDiff:
    return TensorDiff(
        name, slot.role if slot else OTHERS, slot.layer if slot else None, shape, 0.0, change=0.0
    )


def _compare(difference: Difference, name: str, slot: Slot | None, run: Run) -> TensorDiff:
    infos = [model.source.infos[name] for model in difference.pair.models]
    is_matrix = slot is not None and len(infos[0].shape) == 2 and 0 not in infos[0].shape
    sums = _Sums(torch.empty(infos[0].shape) if is_matrix else None)
    are_real = all(info.dtype in REAL for info in infos)
    for before, after in difference.blocks(name):
        if are_real:
            sums.add(before, after)
        else:
            sums.count(before, after)
    role = slot.role if slot else OTHERS
    layer = slot.layer if slot else None
    if not are_real:
        return TensorDiff(name, role, layer, infos[0].shape, sums.moved_share)
    if not isfinite(sums.aa + sums.bb):
        paths = " or ".join(str(model.path) for model in difference.pair.models)
        raise TargetError(f"{name} of {paths} holds NaN or Inf; repair the checkpoint")
    device = pick_device(run.device)
    return TensorDiff(
        name,
        role,
        layer,
        infos[0].shape,
        sums.moved_share,
        norm=sqrt(sums.aa),
        change=sqrt(sums.dd),
        cosine=max(-1.0, min(1.0, sums.ab / sqrt(sums.aa * sums.bb))) if sums.aa and sums.bb else None,
        spectral=_spectral(sums.change_OI.to(device)) if sums.change_OI is not None and sums.dd else None,
    )


class _Sums:
    """Sums in float64 over the blocks of two tensors."""

    def __init__(self, change_OI: Tensor | None) -> None:
        self.change_OI = change_OI
        """Filled with the change, row by row."""
        self.aa = self.bb = self.ab = self.dd = 0.0
        self._moved = 0
        self._entries = 0
        self._row = 0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Add a block of both."""
        self.count(before, after)
        change = after.float() - before.float()
        if self.change_OI is not None:
            self.change_OI[self._row : self._row + len(change)] = change
            self._row += len(change)
        first = before.double()
        second = after.double()
        self.aa += float(first.square().sum())
        self.bb += float(second.square().sum())
        self.ab += float((first * second).sum())
        self.dd += float(change.double().square().sum())

    def count(self, before: Tensor, after: Tensor) -> None:
        """Count the entries whose values differ."""
        if before.dtype != after.dtype:  # element types of 8 bits have no common type
            before = before.double()
            after = after.double()
        self._moved += int((before != after).sum())
        self._entries += before.numel()

    @property
    def moved_share(self) -> float:
        """The share of the entries that differ."""
        return self._moved / self._entries if self._entries else 0.0


def _spectral(change_OI: Tensor) -> Spectral:
    squares_S = squares_of(change_OI, total_energy(change_OI))
    return Spectral(
        stable_rank=stable_rank(squares_S),
        effective_rank=effective_rank(squares_S),
        rank_90=rank_for_energy(squares_S, 0.9),
        rank_99=rank_for_energy(squares_S, 0.99),
    )


def _group(role: str, members: Sequence[TensorDiff]) -> GroupDiff:
    entries = [max(1, torch.Size(one.shape).numel()) for one in members]
    norm = hypot(*(one.norm or 0.0 for one in members))
    spectra = [one.spectral for one in members if one.spectral]
    return GroupDiff(
        role=role,
        tensors=len(members),
        changed=sum(one.moved > 0 for one in members),
        moved=sum(one.moved * count for one, count in zip(members, entries, strict=True)) / sum(entries),
        relative=hypot(*(one.change or 0.0 for one in members)) / norm if norm else None,
        cosine=min((one.cosine for one in members if one.cosine is not None), default=None),
        stable_rank=_mean(one.stable_rank for one in spectra),
        effective_rank=_mean(one.effective_rank for one in spectra),
        rank_90=_mean(one.rank_90 for one in spectra),
        rank_99=_mean(one.rank_99 for one in spectra),
    )


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None
