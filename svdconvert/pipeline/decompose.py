"""decompose: every target matrix becomes a residual and initial factors, one tensor at a time."""

from dataclasses import asdict, dataclass, replace
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdconvert.adapters.adapter_config import CONFIG as ADAPTER_CONFIG
from svdconvert.adapters.peft_files import key
from svdconvert.checkpoint.tensors import torch_dtype
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.errors import TargetError
from svdconvert.inputs.model import OpenModel
from svdconvert.linalg.blocks import total_energy
from svdconvert.linalg.delta import residual_
from svdconvert.linalg.factors import Factors
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.threads import parallel_matrices, pick_device
from svdconvert.linalg.triplets import Spectrum
from svdconvert.manifest.schema import Manifest, Matrix, roles_of
from svdconvert.output.plan import PlannedFile
from svdconvert.output.sidecars import complete_checkpoint, read_config, write_config
from svdconvert.output.staging import StagedOutput
from svdconvert.pipeline.adapter_plan import stack_experts
from svdconvert.pipeline.adapter_targets import matrix_shape
from svdconvert.pipeline.decompose_plan import DecomposePlan
from svdconvert.pipeline.quantised_plan import (
    decoded_dtype,
    quantization_config,
    rule_of,
)
from svdconvert.pipeline.quantised_start import quantised_start
from svdconvert.pipeline.runner import (
    TensorJob,
    TensorResult,
    file_checksums,
    notes,
    source_checksums,
    stream,
)
from svdconvert.quantization.nf4 import Quantized


def decompose_work(plan: DecomposePlan, device: torch.device) -> TensorJob:
    """How each tensor of the source is processed: split, copied, or only read for its checksum."""
    copies = {info.name: file.path for file in plan.shards for info in file.units}
    order = [name for name in copies if name in plan.infos] or list(plan.infos)
    count = matrices_at_once(plan, device)

    def compute(name: str, stored: Tensor) -> TensorResult:
        factors, base, matrix = split_tensor(plan, name, stored, alone=count == 1)
        tensors = {
            (piece.file, key(piece.module, factor)): tensor
            for piece in plan.adapter.pieces[name]
            for factor, tensor in piece.of(factors).pieces().items()
        }
        if isinstance(base, Quantized):
            parts = base.tensors(name, decoded_dtype(plan.infos[name]))
            tensors |= {(copies[part], part): tensor for part, tensor in parts.items()}
        elif name in copies:
            tensors[copies[name], name] = base
        return TensorResult(tensors, asdict(matrix))

    return TensorJob(
        order=order,
        matrices=plan.slots,
        compute=compute,
        copies=copies,
        device=device,
        parallelism=count,
    )


def matrices_at_once(plan: DecomposePlan, device: torch.device) -> int:
    """How many matrices are split at the same time; one with LAPACK, which needs the memory of several."""
    return parallel_matrices(device) if plan.method.parallel and plan.options.svd == "fast" else 1


def split_tensor(
    plan: DecomposePlan, name: str, stored: Tensor, *, alone: bool
) -> tuple[Factors, Tensor | Quantized, Matrix]:
    """(factors as stored, the base's matrix or its residual, measurements) of the matrix `name`.

    `stored` and what becomes of it are (O, I), or (I, O) if the files have the matrix so. If the dtype stays
    the same, the residual may overwrite `stored`, which must not be used afterwards.

    The factors are rounded first and the residual is computed from the rounded factors, so the only error is
    the single rounding of the residual. Raises TargetError if the matrix contains NaN or Inf.
    """
    slot = plan.slots[name]
    info = plan.infos[name]
    options = plan.options
    rank = plan.scalings[name].rank
    scale = plan.scalings[name].scale
    norm = _finite_norm(name, stored)
    solver = Solver(name, options.svd, options.tol, options.seed, alone)
    assert plan.method.split is not None, "plan_decomposition refuses methods without an adapter"
    matrix = Matrix(
        module=slot.module,
        role=slot.role,
        place=slot.place,
        shape=matrix_shape(info, slot),
        dtype=info.dtype,
        rank=rank,
        scale=scale,
    )
    if name in plan.quantised:
        found = quantised_start(stored, plan.alternation(name, solver))
        measured = _measured(found.spectrum) | {"energy": None}  # it is that of W - Q
        error = found.error / norm if norm > 0 else 0.0
        return found.factors, found.base, replace(matrix, error=error, quantised=found.note, **measured)
    transposed = slot.place is not None and slot.place.transposed
    weight_OI = stored.T.contiguous() if transposed else stored
    split = plan.method.split(weight_OI, rank, scale, replace(solver, measured=(weight_OI, norm**2)))
    factors = split.factors.to(getattr(torch, options.dtype))
    base = stored.to(torch_dtype(info.dtype))  # a decoded matrix is computed with in float32
    error = 0.0
    if plan.method.residual:
        base, lost = residual_(weight_OI, factors, scale, torch_dtype(plan.residual_dtype(name)))
        base = base.T.contiguous() if transposed else base
        error = lost / norm if norm > 0 else 0.0
    return factors, base, replace(matrix, error=error, **_measured(split.spectrum))


def _measured(spectrum: Spectrum | None) -> dict[str, Any]:
    if spectrum is None:
        return {}
    return {
        "sigma_first": spectrum.first,
        "sigma_last": spectrum.last,
        "energy": spectrum.energy,
        "excess": spectrum.excess,
        "engine": spectrum.engine,
    }


def _finite_norm(name: str, weight_OI: Tensor) -> float:
    """The Frobenius norm of a matrix. Raises TargetError if it contains NaN or Inf."""
    norm = sqrt(total_energy(weight_OI))
    # The norm needs one cheap pass; the values are only examined if it is not finite.
    if not isfinite(norm) and not weight_OI.isfinite().all():
        count = int((~weight_OI.isfinite()).sum())
        raise TargetError(
            f"{name} holds {count} values that are NaN or Inf; repair the checkpoint "
            "or leave the tensor out of --targets"
        )
    return norm


@dataclass(frozen=True)
class DecomposeJob:
    """The decomposition of one model."""

    model: OpenModel
    plan: DecomposePlan
    command: str = "decompose"

    @property
    def options(self) -> SplitOptions:
        """The options as the user gave them."""
        return self.plan.options

    @property
    def files(self) -> list[PlannedFile]:
        """The shards of the residual, the initial adapter, and what it is put together from."""
        return [*self.plan.shards, *self.plan.adapter.files]

    @property
    def inputs(self) -> list[Path]:
        """The model."""
        return [self.model.path]

    def identity(self) -> dict[str, Any]:
        """The model."""
        return {"model": self.model.identity()}

    def write(self, staged: StagedOutput, run: Run) -> None:
        """Decompose or copy every tensor, then put the factors of experts together."""
        device = pick_device(run.device, run.ranks.local)
        source = self.plan.layout_in_use.divided(self.model.source)
        stream(decompose_work(self.plan, device), source, staged, run)
        if run.ranks.leads:
            stack_experts(self.plan.adapter, staged)

    def write_sidecars(self, directory: Path) -> None:
        """The model's sidecars if its weights were written, and the adapter's configuration."""
        if self.plan.shards:
            self._complete(directory)
        (directory / self.plan.folder / ADAPTER_CONFIG).write_text(self.plan.adapter.config.text())

    def _complete(self, directory: Path) -> None:
        """Add sidecars and index to the shards; config.json says which matrices are in 4 bits."""
        plan = self.plan
        if not plan.quantised:
            complete_checkpoint(
                self.model.sidecars, directory, plan.shards, was_decoded=self.model.is_decoded
            )
            return
        complete_checkpoint(
            self.model.sidecars,
            directory,
            plan.shards,
            dtypes=plan.stored_dtypes,
            was_decoded=self.model.is_decoded,
        )
        rule = rule_of(plan.options)
        assert rule is not None
        config = read_config(directory)
        compute = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        entry = quantization_config(plan.layout_in_use, plan.infos, plan.quantised, rule, compute)
        write_config(directory, config | {"quantization_config": entry})

    def manifest(self, staged: StagedOutput, threads: int) -> Manifest:
        """The manifest of the decomposed directory."""
        measured = notes(staged, self.plan.slots)
        return Manifest(
            kind="decomposed",
            layout=self.plan.layout,
            method=self.options.method,
            base=self.model.origin(source_checksums(staged)),
            base_is_residual=self.plan.base_is_residual,
            options=asdict(self.options),
            matrices={name: Matrix.of(note) for name, note in measured.items()},
            files=file_checksums(staged),
            roles=roles_of(self.files),
            threads=threads,
        )

    def remarks(self, manifest: Manifest) -> tuple[str, ...]:
        """Which matrices a borrowed layout left out."""
        return self.plan.remarks
