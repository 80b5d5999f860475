"""The factors of one matrix of a model, out of an adapter that may store them together with others."""

from dataclasses import replace

import torch

from svdconvert.adapters.peft_files import Adapter
from svdconvert.checkpoint.parts import part_name
from svdconvert.linalg.factors import Factors
from svdconvert.manifest.schema import Matrix


def matrix_factors(adapter: Adapter, matrix: Matrix) -> tuple[Factors, float]:
    """(factors, scale) of a matrix that the adapter was made for.

    The rank is smaller than that of the stored factors if these hold other matrices too.
    """
    place = matrix.place
    if matrix.module in adapter.modules:
        return adapter.factors(matrix.module), adapter.config.scale(matrix.module)
    assert place is not None, f"the adapter has no factors of {matrix.module}"
    if (
        place.projections
        and place.expert is not None
        and part_name(place.parameter, place.expert) not in adapter.modules
    ):
        return _of_projections(adapter, matrix)
    module = place.parameter.removesuffix(".weight")
    module = module if place.expert is None else part_name(place.parameter, place.expert)
    factors = adapter.factors(module)
    if place.rows is not None:
        factors = _own_columns(replace(factors, left_OR=factors.left_OR[place.rows.slice]))
    return factors, adapter.config.scale(module)


def _own_columns(factors: Factors) -> Factors:
    """The factors without the columns of B that are zero, which belong to other matrices."""
    used = factors.left_OR.any(dim=0).nonzero().flatten()
    if len(used) in (0, factors.rank):
        return factors
    columns = slice(int(used[0]), int(used[-1]) + 1)
    core = factors.core
    if core is not None:
        core = core[columns] if core.dim() == 1 else core[columns, columns]
    return Factors(factors.left_OR[:, columns], factors.right_RI[columns], core)


def _of_projections(adapter: Adapter, matrix: Matrix) -> tuple[Factors, float]:
    """The factors of a matrix whose projections have factors by themselves, with one A."""
    assert matrix.place is not None
    holder = matrix.module.rpartition(".")[0]
    modules = [f"{holder}.{projection}" for projection in matrix.place.projections]
    parts = [adapter.factors(module) for module in modules]
    left_OR = torch.empty(matrix.shape[0], parts[0].rank, dtype=parts[0].left_OR.dtype)
    for number, part in enumerate(parts):
        left_OR[matrix.place.rows_of(number, matrix.shape[0]).slice] = part.left_OR
    return replace(parts[0], left_OR=left_OR), adapter.config.scale(modules[0])
