"""Recompute what a manifest claims, file by file and matrix by matrix."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svdconvert.adapters.delta import restored, row_blocks
from svdconvert.artifact.change import Change
from svdconvert.artifact.fingerprint import tensor_checksum
from svdconvert.artifact.manifest import Manifest, Matrix
from svdconvert.checkpoint.reader import SafetensorsSource
from svdconvert.checkpoint.source import TensorSource, torch_dtype
from svdconvert.linalg.core import singular_values

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
        source = SafetensorsSource([directory / file])
        for name in [*marks, *(name for name in source.infos if name not in marks)]:
            if name not in source.infos:
                yield file, name, "is missing"
            elif name not in marks:
                yield file, name, "is not in the manifest"
            elif tensor_checksum(source, name) != marks[name]:
                yield file, name, "has changed since it was written"
            else:
                yield file, name, None


def check_matrix(change: Change, name: str, base: TensorSource, residual: TensorSource | None) -> MatrixCheck:
    """Compare one matrix with its base. `residual` is None where the method leaves the base as it is."""
    assert change.manifest is not None
    matrix = change.manifest.matrices[name]
    weight_OI = base.read(name)
    factors, scale = change.start(matrix.module)
    stored_OI = weight_OI if residual is None else residual.read(name)
    dtype = torch_dtype(matrix.dtype)
    merged_OI = restored(stored_OI, factors, scale, torch.float32)
    error = _relative(merged_OI, weight_OI)
    exact = int((merged_OI.to(dtype) == weight_OI).sum())
    left, right = factors.folded()
    sigma = singular_values(left, right) * scale
    faults = [*_error_fault(matrix, error), *_sigma_faults(matrix, sigma)]
    if residual is not None:
        faults += _energy_fault(matrix, stored_OI, weight_OI)
    return MatrixCheck(name, error, exact, weight_OI.numel(), tuple(faults))


def _relative(found_OI: Tensor, wanted_OI: Tensor) -> float:
    """||found - wanted||_F / ||wanted||_F, in blocks of rows."""
    lost = whole = 0.0
    for rows in row_blocks(wanted_OI):
        wanted = wanted_OI[rows].float()
        lost += float(torch.linalg.vector_norm(found_OI[rows] - wanted)) ** 2
        whole += float(torch.linalg.vector_norm(wanted)) ** 2
    return float((lost / whole) ** 0.5) if whole else float(lost > 0)


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


def _energy_fault(matrix: Matrix, residual_OI: Tensor, weight_OI: Tensor) -> Iterator[str]:
    if matrix.energy is None:
        return
    rest = float(torch.linalg.vector_norm(residual_OI, dtype=torch.float64)) ** 2
    whole = float(torch.linalg.vector_norm(weight_OI, dtype=torch.float64)) ** 2
    energy = 1.0 - rest / whole if whole else 1.0
    if abs(energy - matrix.energy) > 1e-3:
        yield f"captured energy {energy:.5g} instead of {matrix.energy:.5g}"
