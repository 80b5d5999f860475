"""A lost initial adapter, computed from the weights.  O: out features, I: in features, R: rank.

The part that was taken out of the base is s0 B0 A0 = W - W_res, a matrix of rank R except for the rounding of
the residual. So base and residual together determine it. The initial adapters of PiSSA and OLoRA are
determined by the base alone, from which PEFT also recomputes them on loading.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import hypot
from typing import Any

import torch
from torch import Tensor

from svdconvert.adapters.adapter_config import KASA
from svdconvert.checkpoint.tensors import TensorSource, torch_dtype
from svdconvert.errors import ArtifactError
from svdconvert.inputs.tensor_names import Shares, read_matrix
from svdconvert.linalg.factors import Factors
from svdconvert.linalg.solver import Solver
from svdconvert.manifest.results import RecoveredFactors
from svdconvert.methods.base import METHODS
from svdconvert.quantization.view import is_decoded

REPEATABLE = ("pissa", "olora", KASA)
"""PEFT's names of the initialisations that the base alone determines; pissa_niter_4 is random."""
_LARGEST_ERROR = 0.5  # relative; above it the difference is mostly rounding
_FLOAT32 = 1e-5  # error of float32 arithmetic, as a share of the base


@dataclass(frozen=True, slots=True)
class Loss:
    """Frobenius norms over one matrix."""

    rest: float
    """||W - W_res - s0 B0 A0||."""
    start: float
    """||W - W_res||."""
    base: float
    """||W||."""

    @property
    def error(self) -> float:
        """||W - W_res - s0 B0 A0|| / ||W - W_res||."""
        return self.rest / self.start


@dataclass(frozen=True)
class RecoveredInit:
    """The initial factors of an adapter's modules, each computed when it is needed."""

    base: TensorSource
    residual: TensorSource | None
    """None if the factors are recomputed from the base alone."""
    shares: Shares
    """Module -> tensors."""
    ranks: Mapping[str, int]
    """Module -> rank."""
    scales: Mapping[str, float]
    """Module -> the scale of its initial factors."""
    method: str = "pissa"
    losses: dict[str, Loss] = field(default_factory=dict)
    """Module -> loss, for the modules that have been computed so far."""

    def factors(self, module: str) -> Factors:
        """The initial factors without their scale. Raises ArtifactError if they cannot be determined."""
        shares = self.shares[module]
        name = shares[0].tensor
        rank = self.ranks[module]
        weight_OI = read_matrix(self.base, shares).float()
        if self.residual is None:
            split = METHODS.get("milora" if self.method == KASA else self.method).split
            assert split is not None
            return split(weight_OI, rank, 1.0, Solver(name, svd="exact")).factors
        norm = _norm(weight_OI)
        difference_OI = weight_OI - read_matrix(self.residual, shares).float()
        start = _norm(difference_OI)
        if start == 0.0:
            raise ArtifactError(
                f"{name} is the same in base and residual, so nothing was taken out of it; if the adapter "
                "started at zero, give --init none"
            )
        top = Solver(name, tol=1e-4).top(difference_OI, rank)
        root_R = top.sigma_R.sqrt()
        found = Factors(top.left_OR * root_R, root_R[:, None] * top.right_RI)
        rest = _norm(difference_OI.addmm_(found.left_OR, found.right_RI, alpha=-1.0))
        self.losses[module] = Loss(rest, start, norm)
        self._check(name, rank, self.losses[module], self._coarsest_dtype(name))
        return found

    def _coarsest_dtype(self, name: str) -> torch.dtype:
        """That of the residual, or the one that a quantised base may have been rounded to before."""
        assert self.residual is not None
        residual = torch_dtype(self.residual.infos[name].dtype)
        base = torch_dtype(self.base.infos[name].dtype) if is_decoded(self.base, name) else residual
        return max(residual, base, key=lambda dtype: torch.finfo(dtype).eps)

    def _check(self, name: str, rank: int, loss: Loss, dtype: torch.dtype) -> None:
        # One rounding changes an entry by at most half an eps; the factor 4 allows for several roundings.
        if loss.rest > (4.0 * torch.finfo(dtype).eps / 2 + _FLOAT32) * loss.base:
            raise ArtifactError(
                f"{name} of base and residual do not differ by a matrix of rank {rank} ({loss.error:.0%} of "
                "the difference remains): they do not belong together; give the base and the residual of "
                "this adapter"
            )
        if loss.error > _LARGEST_ERROR:
            raise ArtifactError(
                f"{name} of the residual is rounded too coarsely to recover the initial adapter "
                f"({loss.error:.0%} of the difference is rounding); use merge --from residual, or give the "
                "initial adapter with --init"
            )

    @property
    def way(self) -> str:
        """How it is computed: "difference", or the method by which it is recomputed from the base."""
        return self.method if self.residual is None else "difference"

    def file_versions(self) -> dict[str, Any]:
        """Describes the weights: an interrupted run continues only if this is unchanged."""
        return {**self.base.file_versions(), **(self.residual.file_versions() if self.residual else {})}

    def result(self) -> RecoveredFactors:
        """The errors of the factors computed so far, for the manifest."""
        if self.residual is None:
            return RecoveredFactors(by=self.way)
        rest = hypot(*(loss.rest for loss in self.losses.values()))
        start = hypot(*(loss.start for loss in self.losses.values()))
        base = hypot(*(loss.base for loss in self.losses.values()))
        return RecoveredFactors(
            by=self.way,
            error=rest / start,
            of_base=rest / base,
            modules={module: loss.error for module, loss in self.losses.items()},
        )


def _norm(matrix_OI: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix_OI))
