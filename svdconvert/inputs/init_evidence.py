"""Determines from the weights whether an adapter started at zero or as a part of its base.

This is needed for adapters whose files do not record it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch

from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapted_tensors import adapted_tensors
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.model import OpenModel
from svdconvert.inputs.tensor_names import read_matrix

_SAMPLE = 16  # matrices that are compared, spread over the layers
_CLEAR = 0.5  # share and cosine above which the adapter started as a part of the base
_UNCLEAR = 0.25  # share above which it may have


@dataclass(frozen=True)
class InitEvidence:
    """How similar an adapter is to a part of its base.

    With D = scale * B A and P W Q the projection of the base's matrix W on the column space of B and the row
    space of A: share = <D, W> / ||D||^2 and cosine = <D, P W Q> / (||D|| ||P W Q||), over all matrices
    that are compared. Both are 1 for a slice of W (as PiSSA, MiLoRA and OLoRA start). For an adapter that
    started at zero the cosine is near 0, and so is the share unless the update is tiny. So both are tested.
    """

    share: float
    cosine: float

    @property
    def is_slice(self) -> bool:
        """True if the adapter started as a part of the base."""
        return self.share > _CLEAR and self.cosine > _CLEAR

    @property
    def is_unclear(self) -> bool:
        """True if the adapter may have started as a part of the base, but this is not certain."""
        return not self.is_slice and self.share > _UNCLEAR and self.cosine > _CLEAR


def measure_init(delta: AdapterDelta, base: OpenModel) -> InitEvidence:
    """Compare the adapter with a sample of the base's matrices."""
    names = adapted_tensors(delta, base)
    source = base.layout(delta.layout_name)[1].divided(base.source)
    along = size = projected = 0.0
    for module in _spread([module for module in delta.modules if module in names]):
        factors, scale = delta.trained(module)
        weight_OI = read_matrix(source, names[module]).float()
        left_OR, right_RI = factors.folded()
        if weight_OI.shape != (left_OR.shape[0], right_RI.shape[1]):
            continue  # planning the merge reports it in more detail
        basis_OR, core_left = torch.linalg.qr(left_OR * scale)
        basis_IR, core_right = torch.linalg.qr(right_RI.T)
        core_RR = core_left @ core_right.T
        weight_RR = basis_OR.T @ weight_OI @ basis_IR
        along += float((core_RR * weight_RR).sum())
        size += float(core_RR.square().sum())
        projected += float(weight_RR.square().sum())
    if size == 0.0 or projected == 0.0:
        return InitEvidence(0.0, 0.0)
    return InitEvidence(along / size, along / sqrt(size * projected))


def refuse_hidden_init(delta: AdapterDelta, base: OpenModel) -> None:
    """Raise ArtifactError if an adapter that is assumed to have started at zero did not, or may not have."""
    if not delta.is_assumed_zero:
        return
    evidence = measure_init(delta, base)
    if evidence.is_slice or evidence.is_unclear:
        verb = "contains" if evidence.is_slice else "may contain"
        raise ArtifactError(
            f"{delta.directory} {verb} a part of {base.path} itself (share {evidence.share:.2f}), as "
            "PiSSA, MiLoRA and OLoRA start: it belongs to a residual, and merging it into the base would add "
            "that part twice; give the residual with --residual, the initial adapter with --init, or "
            "--init none if it started at zero"
        )


def _spread(modules: Sequence[str]) -> Sequence[str]:
    step = max(1, len(modules) // _SAMPLE)
    return modules[::step][:_SAMPLE]
