"""extract --plan: what would be read and written and, by a sketch, the error that each rank would have."""

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import ELEMENTS, dtype_code
from svdconvert.config.execution import Run
from svdconvert.config.progress import report
from svdconvert.inputs.model_pair import Difference
from svdconvert.linalg.blocks import total_energy
from svdconvert.linalg.spectrum import rank_for_energy, squares_of
from svdconvert.linalg.threads import float32_products, use_threads
from svdconvert.pipeline.extract_plan import ExtractPlan
from svdconvert.pipeline.rank_table import RankRow, rank_rows

_WORKING = 4  # float32 copies of the largest matrix that the search needs
_PROCESS = 200_000_000  # bytes of the process with torch imported


@dataclass(frozen=True)
class RoleRow:
    """The matrices of one role and shape."""

    role: str
    shape: tuple[int, int]
    count: int


@dataclass(frozen=True)
class ExtractEstimate:
    """What an extraction would read and write. Sizes in bytes."""

    rows: list[RoleRow]
    read: int
    equal: int
    """Tensors that are known to be equal, by the checksums of their files."""
    memory: int
    written: int | None = None
    """None if the ranks follow from the weights."""
    changed: int | None = None
    """Target matrices that differ; None without a sketch."""
    ranks: tuple[RankRow, ...] = ()
    tolerances: tuple[tuple[float, int, int], ...] = ()
    """(share of the energy, largest rank, sum of the ranks) for --energy."""


def estimate_extraction(plan: ExtractPlan, run: Run, *, sketch: bool) -> ExtractEstimate:
    """Estimate from headers; with `sketch` from the spectra of all changes, which reads the weights once."""
    groups = Counter((slot.role, plan.infos[name].shape) for name, slot in plan.slots.items())
    rows = [RoleRow(role, (shape[0], shape[1]), count) for (role, shape), count in sorted(groups.items())]
    largest = max(row.shape[0] * row.shape[1] for row in rows)
    found = ExtractEstimate(
        rows=rows,
        read=plan.nbytes,
        equal=len(plan.pair.equal),
        memory=_PROCESS + _WORKING * 4 * largest,
        written=_size(plan, [*plan.slots], plan.fixed_rank) if plan.fixed_rank else None,
    )
    if not sketch:
        return found
    use_threads(run.threads)
    spectra = _spectra(plan, run)
    sums = {share: [rank_for_energy(one, share) for one in spectra.values()] for share in (0.5, 0.9, 0.99)}
    return replace(
        found,
        changed=len(spectra),
        ranks=tuple(rank_rows(spectra, lambda rank: _size(plan, [*spectra], rank))),
        tolerances=tuple((share, max(ranks), sum(ranks)) for share, ranks in sums.items() if ranks),
    )


def _size(plan: ExtractPlan, names: list[str], rank: int) -> int:
    """Bytes of the factors of these matrices, padded to one rank."""
    width = ELEMENTS[dtype_code(getattr(torch, plan.options.dtype))][0] // 8
    own = max((min(rank, *plan.infos[name].shape) for name in names), default=0)
    return sum(own * sum(plan.infos[name].shape) * width for name in names)


def _spectra(plan: ExtractPlan, run: Run) -> dict[str, Tensor]:
    """Tensor -> squared singular values of its change, for the matrices that changed."""
    difference = Difference(plan.pair)
    spectra = {}
    with float32_products():
        for done, name in enumerate(plan.slots, 1):
            change = difference.read(name)
            if energy := total_energy(change):
                spectra[name] = squares_of(change, energy)
            report("spectra", done, len(plan.slots), "matrices", name=name)
    return spectra
