"""A start that was not kept, found again from the weights.  O: out features, I: in features, R: rank.

What an adapter took out of its base is s0 B0 A0 = W - W_res, a matrix of rank R up to the rounding of the
residual: base and residual together say what it was, though no initial adapter was kept or another one was
drawn since. PiSSA's and OLoRA's starts follow from the base alone, as PEFT computes them again on loading.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import hypot
from typing import Any

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import TensorSource, torch_dtype
from svdconvert.errors import ArtifactError
from svdconvert.linalg.factors import Factors
from svdconvert.linalg.solver import Solver
from svdconvert.manifest.results import RecoveredFactors
from svdconvert.methods.base import METHODS

REPEATABLE = ("pissa", "olora")
"""What PEFT calls the starts that the base alone decides; pissa_niter_4 is drawn by chance."""
_HOPELESS = 0.5  # of the difference: no start is left in it
_FLOAT32 = 1e-5  # what float32 arithmetic may lose, as a share of the base


@dataclass(frozen=True, slots=True)
class Loss:
    """Frobenius norms over one matrix."""

    rest: float
    """Of what the factors do not say."""
    start: float
    """Of W - W_res."""
    base: float
    """Of W."""

    @property
    def error(self) -> float:
        """What is left over, as a share of the start."""
        return self.rest / self.start


@dataclass(frozen=True)
class RecoveredInit:
    """The starts of an adapter's modules, computed when they are asked for."""

    base: TensorSource
    residual: TensorSource | None
    """None where the method repeats the start from the base."""
    names: Mapping[str, str]
    """Module -> tensor."""
    ranks: Mapping[str, int]
    """By module."""
    scales: Mapping[str, float]
    """By module: what the factors were taken out with."""
    method: str = "pissa"
    losses: dict[str, Loss] = field(default_factory=dict)
    """By module, of those that were computed so far."""

    def factors(self, module: str) -> Factors:
        """The start without its scale. Raises ArtifactError where the weights do not say it."""
        name = self.names[module]
        rank = self.ranks[module]
        weight_OI = self.base.read(name).float()
        if self.residual is None:
            split = METHODS.get(self.method).split
            assert split is not None
            return split(weight_OI, rank, 1.0, Solver(name, svd="exact")).factors
        whole = _norm(weight_OI)
        gap_OI = weight_OI - self.residual.read(name).float()
        start = _norm(gap_OI)
        if start == 0.0:
            raise ArtifactError(
                f"{name} is the same in base and residual, so nothing was taken out of it; if the adapter "
                "started at zero, say --init none"
            )
        top = Solver(name, tol=1e-4).top(gap_OI, rank)
        root_R = top.sigma_R.sqrt()
        found = Factors(top.left_OR * root_R, root_R[:, None] * top.right_RI)
        rest = _norm(gap_OI.addmm_(found.left_OR, found.right_RI, alpha=-1.0))
        self.losses[module] = Loss(rest, start, whole)
        self._refuse(name, rank, self.losses[module], torch_dtype(self.residual.infos[name].dtype))
        return found

    def _refuse(self, name: str, rank: int, loss: Loss, dtype: torch.dtype) -> None:
        # One rounding moves an entry by half an eps of itself at most; some more for detours of others.
        if loss.rest > (4.0 * torch.finfo(dtype).eps / 2 + _FLOAT32) * loss.base:
            raise ArtifactError(
                f"{name} of base and residual differ by no matrix of rank {rank} ({loss.error:.0%} of it is "
                "left over): they do not belong together; give the base and the residual of this adapter"
            )
        if loss.error > _HOPELESS:
            raise ArtifactError(
                f"{name} of the residual is rounded too coarsely to tell its start ({loss.error:.0%} of what "
                "it differs by is rounding); merge from the residual, or name the start with --init"
            )

    @property
    def way(self) -> str:
        """How it is found: difference, or the method that repeats it."""
        return self.method if self.residual is None else "difference"

    def file_versions(self) -> dict[str, Any]:
        """What must be unchanged for an interrupted run to continue."""
        return {**self.base.file_versions(), **(self.residual.file_versions() if self.residual else {})}

    def result(self) -> RecoveredFactors:
        """How exact it is, for the manifest."""
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
