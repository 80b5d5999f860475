"""Recompute what a manifest claims, file by file and matrix by matrix."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path

import torch
from torch import Tensor

from svdconvert.adapters.peft_files import Adapter
from svdconvert.checkpoint.safetensors_files import open_file
from svdconvert.checkpoint.tensors import TensorSource, blocks_of_rows, torch_dtype
from svdconvert.linalg.blocks import rows_at_once
from svdconvert.linalg.factors import Factors
from svdconvert.linalg.gemm import matmul_f32
from svdconvert.linalg.low_rank import singular_values
from svdconvert.manifest.fingerprint import file_checksum, tensor_checksum
from svdconvert.manifest.schema import Manifest, Matrix
from svdconvert.output.file_kinds import is_named_as_weights

_ROUNDING = 2e-6
"""What float32 may differ by between two computations of one error."""


@dataclass(frozen=True, slots=True)
class MatrixCheck:
    """One matrix, recomputed."""

    name: str
    error: float
    """||W_res + scale * B A - W||_F / ||W||_F."""
    exact: int
    """Entries that come back bit for bit when residual and adapter are merged in the base's dtype."""
    entries: int
    faults: tuple[str, ...]


def check_files(directory: Path, manifest: Manifest) -> Iterator[tuple[str, str, str | None]]:
    """(file, tensor, fault or None) for every stored tensor."""
    for file, marks in manifest.files.items():
        source = open_file(directory / file)
        for name in [*marks, *(name for name in source.infos if name not in marks)]:
            if name not in source.infos:
                yield file, name, "is missing"
            elif name not in marks:
                yield file, name, "is not in the manifest"
            elif tensor_checksum(source, name) != marks[name]:
                yield file, name, "has changed since it was written"
            else:
                yield file, name, None


def check_sidecars(directory: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(file, fault) for every other file that changed, and for weights that the manifest does not know."""
    for name, known in manifest.sidecars.items():
        path = directory / name
        if not path.is_file():
            yield name, "is missing"
        elif file_checksum(path) != known:
            yield name, "has changed since it was written"
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if is_named_as_weights(path.name) and name not in manifest.files and name not in manifest.sidecars:
            yield name, "holds weights that are not in the manifest"


def check_matrix(
    initial: Adapter, matrix: Matrix, name: str, base: TensorSource, residual: TensorSource | None
) -> MatrixCheck:
    """Compare one matrix with its base. `residual` is None if the method leaves the base as it is."""
    rows = rows_at_once(*matrix.shape)
    weights = blocks_of_rows(base, name, rows)
    pairs = (
        ((each, each) for each in weights)
        if residual is None
        else zip(weights, blocks_of_rows(residual, name, rows), strict=True)
    )
    factors = initial.factors(matrix.module)
    scale = initial.config.scale(matrix.module)
    sums = _compare(pairs, factors, scale, torch_dtype(matrix.dtype))
    error = sqrt(sums.lost / sums.whole) if sums.whole else float(sums.lost > 0)
    faults = [*_error_fault(matrix, error), *_sigma_faults(matrix, _slice_sigma(factors, scale))]
    if residual is not None:
        faults += _energy_fault(matrix, 1.0 - sums.rest / sums.whole if sums.whole else 1.0)
    return MatrixCheck(name, error, sums.exact, prod(matrix.shape), tuple(faults))


def _slice_sigma(factors: Factors, scale: float) -> Tensor:
    """The singular values of the slice that the factors were made of.

    A trained core between frozen sides (LoRA-XS) is no part of it.
    """
    if factors.core is not None and factors.core.dim() == 2:
        return singular_values(factors.left_OR.float(), factors.right_RI.float())
    return singular_values(*factors.folded()) * scale


@dataclass(slots=True)
class _Sums:
    """Squared norms over a matrix, and how many entries come back exactly."""

    lost: float = 0.0
    rest: float = 0.0
    whole: float = 0.0
    exact: int = 0


def _compare(
    pairs: Iterable[tuple[Tensor, Tensor]], factors: Factors, scale: float, dtype: torch.dtype
) -> _Sums:
    """Merge and compare in blocks of rows of the base and the residual: no matrix is whole in memory."""
    sums = _Sums()
    start = 0
    left, right = factors.folded()
    left = left * scale
    for weight, residual in pairs:
        wanted = weight.float()
        stored = residual.float()
        rows = slice(start, start := start + len(weight))
        merged = matmul_f32(left[rows], right).add_(stored)
        sums.exact += int((merged.to(dtype) == weight).sum())
        sums.lost += float(torch.linalg.vector_norm(merged.sub_(wanted))) ** 2
        sums.rest += float(torch.linalg.vector_norm(stored)) ** 2
        sums.whole += float(torch.linalg.vector_norm(wanted)) ** 2
    return sums


def _error_fault(matrix: Matrix, error: float) -> Iterator[str]:
    if abs(error - matrix.error) > _ROUNDING + 0.01 * matrix.error:
        yield f"reconstruction error {error:.3g} instead of {matrix.error:.3g}"


def _sigma_faults(matrix: Matrix, sigma: Tensor) -> Iterator[str]:
    for label, claimed, found in (
        ("first", matrix.sigma_first, float(sigma[0])),
        ("last", matrix.sigma_last, float(sigma[-1])),
    ):
        if claimed is not None and abs(found - claimed) > 1e-3 * (matrix.sigma_first or 1.0):
            yield f"{label} singular value {found:.5g} instead of {claimed:.5g}"


def _energy_fault(matrix: Matrix, energy: float) -> Iterator[str]:
    if matrix.energy is not None and abs(energy - matrix.energy) > 1e-3:
        yield f"captured energy {energy:.5g} instead of {matrix.energy:.5g}"
