"""Recomputes by how much a 4-bit residual with its factors is closer to the weight than plain NF4."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from svdconvert.errors import RecipeError
from svdconvert.linalg.factors import Factors
from svdconvert.manifest.schema import Manifest, Matrix
from svdconvert.pipeline.quantised_plan import sampled_per_role
from svdconvert.pipeline.quantised_start import difference, norm_of, nuclear_norm, reduction
from svdconvert.quantization.nf4 import Rule, encode

_TOLERANCE = 1e-3  # of a ratio: the residual is read after a rounding to the dtype of config.json


@dataclass(frozen=True, slots=True)
class Reductions:
    """By which share the error of one matrix is below that of plain NF4."""

    role: str
    frobenius: float
    nuclear: float | None
    """None if it was not measured."""


def measure_reductions(
    weight_OI: Tensor, residual_OI: Tensor, factors: Factors, matrix: Matrix, *, nuclear: bool
) -> Reductions:
    """Compare a weight and what its residual and its initial factors add up to. All are on one device."""
    assert matrix.quantised is not None
    plain_OI = difference(weight_OI, encode(weight_OI, Rule(matrix.quantised.format)))
    plain = norm_of(plain_OI)
    plain_nuclear = nuclear_norm(plain_OI) if nuclear else 0.0
    del plain_OI
    rest_OI = (weight_OI.float() - residual_OI.float()).sub_(factors.dense(matrix.scale))
    return Reductions(
        matrix.role,
        reduction(norm_of(rest_OI), plain),
        reduction(nuclear_norm(rest_OI), plain_nuclear) if nuclear else None,
    )


def reduction_faults(matrix: Matrix, found: Reductions) -> Iterator[str]:
    """Differences from the manifest."""
    claimed = matrix.quantised
    assert claimed is not None
    pairs = [
        ("Frobenius", claimed.reduction, found.frobenius),
        ("nuclear", claimed.nuclear_reduction, found.nuclear),
    ]
    for norm, stated, measured in pairs:
        if stated is not None and measured is not None and abs(stated - measured) > _TOLERANCE:
            yield f"{norm} error {measured:.2%} below that of NF4 instead of {stated:.2%}"


def nuclear_sample(manifest: Manifest, choice: str | None) -> frozenset[str]:
    """The matrices whose nuclear norms are measured. Raises RecipeError if no residual is in 4 bits."""
    names = [name for name, matrix in manifest.matrices.items() if matrix.quantised]
    if choice is not None and not names:
        raise RecipeError(
            "--nuclear-ratio changes nothing here: no residual is stored in 4 bits; leave it out"
        )
    roles = {name: matrix.role for name, matrix in manifest.matrices.items()}
    return sampled_per_role(roles, names, choice)


def mean_reductions(found: Iterable[Reductions]) -> Mapping[str, Mapping[str, float]]:
    """Norm -> role -> mean, and "all" -> mean over all matrices."""
    sums: dict[str, dict[str, list[float]]] = {}
    for each in found:
        for norm, value in (("Frobenius", each.frobenius), ("nuclear", each.nuclear)):
            for role in (each.role, "all") if value is not None else ():
                sums.setdefault(norm, {}).setdefault(role, []).append(value or 0.0)
    return {
        norm: {role: sum(values) / len(values) for role, values in roles.items()}
        for norm, roles in sums.items()
    }
