"""to-lora --plan: what would be written, and the error that each rank would have. Reads the factors."""

from dataclasses import dataclass

from svdconvert.checkpoint.tensors import ELEMENTS, dtype_code
from svdconvert.linalg.low_rank import singular_values
from svdconvert.pipeline.estimate import copy_seconds
from svdconvert.pipeline.lora_plan import LoraPlan, exact_factors
from svdconvert.pipeline.rank_table import RankRow, rank_rows

_PROCESS = 250_000_000  # bytes of the process with torch imported
_COPIES = 6  # float64 copies of the largest matrix's factors that the QRs need


@dataclass(frozen=True, kw_only=True)
class LoraEstimate:
    """What `to-lora` would do. Sizes in bytes, time in seconds."""

    modules: int
    rank: int
    """The rank in the configuration: the largest one of a module."""
    relative_error: float
    """||change - BA||_F / ||change||_F over all modules, with the options as given; 0 if it is exact."""
    changed: bool
    """False if the factors are those from before training, so the LoRA would change nothing."""
    written: int
    memory: int
    seconds: float
    ranks: tuple[RankRow, ...]
    """Empty for a DoRA, whose error depends on its base."""


def estimate_lora(plan: LoraPlan) -> LoraEstimate:
    """Estimate from the factors, one module's in memory at a time."""
    delta = plan.delta
    spectra = {}
    sides = {}
    for module in delta.modules if delta.approximation is None else ():
        left, right = exact_factors(delta, module)
        spectra[module] = singular_values(left.double(), right.double()).square()
        sides[module] = (left.shape[0] + right.shape[1], left.shape[1])
    width = ELEMENTS[dtype_code(plan.dtype)][0] // 8
    largest = max((side * rank for side, rank in sides.values()), default=0)
    return LoraEstimate(
        modules=len(delta.modules),
        rank=plan.rank,
        relative_error=plan.truncation.error if plan.truncation else 0.0,
        changed=not spectra or any(float(one.sum()) > 0 for one in spectra.values()),
        written=plan.file.nbytes,
        memory=_PROCESS + _COPIES * 8 * largest,
        seconds=copy_seconds(3 * plan.file.nbytes),
        ranks=tuple(rank_rows(spectra, lambda rank: sum(side * rank * width for side, _ in sides.values()))),
    )
