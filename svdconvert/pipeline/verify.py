"""verify: the checksums and errors in a manifest are recomputed, file by file and matrix by matrix."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod, sqrt
from pathlib import Path

import torch
from torch import Tensor

from svdconvert.adapters.matrix_factors import matrix_factors
from svdconvert.adapters.peft_files import Adapter
from svdconvert.checkpoint.parts import with_known_parts
from svdconvert.checkpoint.safetensors_files import open_checkpoint, open_file
from svdconvert.checkpoint.tensors import TensorSource, torch_dtype
from svdconvert.config.display import Shown
from svdconvert.config.execution import Run
from svdconvert.config.progress import report
from svdconvert.inputs.model import OpenModel
from svdconvert.inputs.open_adapter import open_initial_adapter
from svdconvert.inputs.storage_format import decoded
from svdconvert.linalg.blocks import rows_at_once
from svdconvert.linalg.delta import Product
from svdconvert.linalg.factors import Factors
from svdconvert.linalg.gemm import matmul_f32
from svdconvert.linalg.low_rank import singular_values
from svdconvert.linalg.threads import parallel_matrices, worker_pool
from svdconvert.manifest.fingerprint import file_checksum, tensor_checksum
from svdconvert.manifest.place import Place
from svdconvert.manifest.schema import Manifest, Matrix
from svdconvert.output.file_kinds import is_named_as_weights
from svdconvert.output.sidecars import read_config
from svdconvert.pipeline.verify_quantised import (
    Reductions,
    mean_reductions,
    measure_reductions,
    nuclear_sample,
    reduction_faults,
)
from svdconvert.quantization.view import read_to_compute, rows_to_compute

_ROUNDING = 2e-6
"""Difference that float32 may cause between two computations of the same error."""


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """What `verify` found."""

    directory: Path
    kind: str
    tensors: int
    """Stored tensors whose checksums were compared."""
    matrices: int
    """Matrices that were compared with the base; 0 if it was not found."""
    base: str | None
    """The base's location; None if it was not found."""
    worst: float
    """Largest relative reconstruction error."""
    exact: float | None
    """Share of the entries of adapted matrices that are reconstructed bit for bit from the stored files."""
    reductions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of a 4-bit residual: norm -> role -> the mean share by which its errors are below those of NF4."""
    evaluations: int = 0
    """Results of `eval` that were compared with their answers."""
    faults: list[str] = field(default_factory=list)
    """Differences from the manifest, one sentence each."""

    def shown_as(self) -> Mapping[str, object]:
        """Whether it passed, and what was compared."""
        return {
            "directory": str(self.directory),
            "passed": self.passed,
            "kind": self.kind,
            "tensors": self.tensors,
            "matrices": self.matrices or None,
            "worst": self.worst if self.matrices else None,
            "faults": len(self.faults) or None,
            "first fault": self.faults[0] if self.faults else None,
        }

    @property
    def passed(self) -> bool:
        """True if everything agrees with the manifest."""
        return not self.faults


@dataclass(frozen=True, slots=True)
class MatrixCheck:
    """What was recomputed for one matrix."""

    name: str
    error: float
    """||W_res + scale * B A - W||_F / ||W||_F."""
    exact: int
    """Entries that equal the base's bit for bit when residual and adapter are merged in its dtype."""
    entries: int
    faults: tuple[str, ...]
    """Differences from the manifest."""
    reductions: Reductions | None = None
    """None if the residual is in plain numbers."""


def check_directory(
    directory: Path, manifest: Manifest, base: OpenModel | None, run: Run, nuclear_ratio: str | None = None
) -> Report:
    """Compare every file with the manifest and, if there is a `base`, every adapted matrix with it.

    `nuclear_ratio` says on how many matrices of a 4-bit residual nuclear norms are measured.
    """
    nuclear = nuclear_sample(manifest, nuclear_ratio)
    faults = []
    tensors = 0
    total = sum(len(checksums) for checksums in manifest.files.values())
    for file, name, fault in check_files(directory, manifest):
        tensors += 1
        report("verify", tensors, total, "tensors", name=name, file=file)
        if fault:
            faults.append(f"{directory / file}: {name} {fault}")
    faults += [f"{directory / name} {fault}" for name, fault in check_sidecars(directory, manifest)]
    checks = list(check_matrices(directory, manifest, base.source, run, nuclear)) if base else []
    faults += [f"{check.name}: {fault}" for check in checks for fault in check.faults]
    entries = sum(check.entries for check in checks)
    return Report(
        directory=directory,
        kind=manifest.kind,
        tensors=tensors,
        matrices=len(checks),
        base=base.snapshot.location if base else None,
        worst=max((check.error for check in checks), default=0.0),
        exact=sum(check.exact for check in checks) / entries if entries else None,
        reductions=mean_reductions(check.reductions for check in checks if check.reductions),
        faults=faults,
    )


def check_files(directory: Path, manifest: Manifest) -> Iterator[tuple[str, str, str | None]]:
    """(file, tensor, fault or None) for every tensor that is stored or listed."""
    for file, checksums in manifest.files.items():
        source = with_known_parts(open_file(directory / file), checksums)
        for name in [*checksums, *(name for name in source.infos if name not in checksums)]:
            if name not in source.infos:
                yield file, name, "is missing"
            elif name not in checksums:
                yield file, name, "is not in the manifest"
            elif tensor_checksum(source, name) != checksums[name]:
                yield file, name, "has changed since it was written"
            else:
                yield file, name, None


def check_sidecars(directory: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(file, fault) for every sidecar that has changed, and every file of weights that is not listed."""
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


def check_matrices(
    directory: Path,
    manifest: Manifest,
    base: TensorSource,
    run: Run,
    nuclear: Collection[str] = (),
) -> Iterator[MatrixCheck]:
    """Compare every adapted matrix with the base, several at the same time."""
    initial = open_initial_adapter(directory, manifest)
    base = with_known_parts(base, manifest.matrices)
    residual = _open_residual(directory, manifest) if manifest.base_is_residual else None

    def check_one(name: str) -> MatrixCheck:
        matrix = manifest.matrices[name]
        check = check_matrix(initial, matrix, name, base, residual)
        if matrix.quantised is None or residual is None:
            return check
        found = measure_reductions(
            read_to_compute(base, name),
            read_to_compute(residual, name),
            initial.factors(matrix.module),
            matrix,
            nuclear=name in nuclear,
        )
        return replace(check, reductions=found, faults=(*check.faults, *reduction_faults(matrix, found)))

    total = sum(base.infos[name].nbytes for name in manifest.matrices)
    done = 0
    # check_files has reported residuals that are missing.
    names = [name for name in manifest.matrices if residual is None or name in residual.infos]
    with worker_pool(parallel_matrices(torch.device("cpu"))) as pool:
        for check in pool.map(check_one, names):
            yield check
            done += base.infos[check.name].nbytes
            report("recompute", done, total, "bytes", name=check.name)


def _open_residual(directory: Path, manifest: Manifest) -> TensorSource:
    stored = open_checkpoint(directory)
    if any(matrix.quantised for matrix in manifest.matrices.values()):
        stored = decoded(stored, read_config(directory), directory)
    return with_known_parts(stored, manifest.matrices)


def check_matrix(
    initial: Adapter, matrix: Matrix, name: str, base: TensorSource, residual: TensorSource | None
) -> MatrixCheck:
    """Compare one matrix with its base. `residual` is None if the method leaves the base unchanged."""
    rows = rows_at_once(*base.infos[name].shape)
    weights = rows_to_compute(base, name, rows)
    pairs = (
        ((each, each) for each in weights)
        if residual is None
        else zip(weights, rows_to_compute(residual, name, rows), strict=True)
    )
    factors, scale = matrix_factors(initial, matrix)
    sums = _compare(pairs, _as_stored(factors, scale, matrix.place), torch_dtype(matrix.dtype))
    error = sqrt(sums.error / sums.base) if sums.base else float(sums.error > 0)
    faults = [*_error_fault(matrix, error), *_sigma_faults(matrix, _slice_sigma(factors, scale))]
    if residual is not None:
        faults += _energy_fault(matrix, 1.0 - sums.residual / sums.base if sums.base else 1.0)
    return MatrixCheck(name, error, sums.exact, prod(matrix.shape), tuple(faults))


def _as_stored(factors: Factors, scale: float, place: Place | None) -> Product:
    """(left, right) whose product is the part of the tensor that the factors hold."""
    left, right = factors.folded()
    left = left * scale
    return (right.T, left.T) if place is not None and place.transposed else (left, right)


def _slice_sigma(factors: Factors, scale: float) -> Tensor:
    """The singular values of the part of the matrix that the factors hold.

    The core of LoRA-XS, which is zero at the start, is not included.
    """
    if factors.core is not None and factors.core.dim() == 2:
        return singular_values(factors.left_OR.float(), factors.right_RI.float())
    return singular_values(*factors.folded()) * scale


@dataclass(slots=True)
class _Sums:
    """Squared norms over a matrix, and the number of entries that are reconstructed exactly."""

    error: float = 0.0
    residual: float = 0.0
    base: float = 0.0
    exact: int = 0


def _compare(pairs: Iterable[tuple[Tensor, Tensor]], product: Product, dtype: torch.dtype) -> _Sums:
    """Merge and compare one block of rows at a time, so that no entire matrix is in memory."""
    sums = _Sums()
    start = 0
    left, right = product
    for weight, residual in pairs:
        base_part = weight.float()
        residual_part = residual.float()
        rows = slice(start, start := start + len(weight))
        merged = matmul_f32(left[rows], right).add_(residual_part)
        sums.exact += int((merged.to(dtype) == weight.to(dtype)).sum())
        sums.error += float(torch.linalg.vector_norm(merged.sub_(base_part))) ** 2
        sums.residual += float(torch.linalg.vector_norm(residual_part)) ** 2
        sums.base += float(torch.linalg.vector_norm(base_part)) ** 2
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
