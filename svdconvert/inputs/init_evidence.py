"""Did an adapter start at zero, or as a part of the base?  Asked of the weights if no file says it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch

from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.model import OpenModel

_SAMPLE = 16  # matrices that are looked at, spread over the layers
_CLEAR = 0.5
_UNCLEAR = 0.25


@dataclass(frozen=True)
class InitEvidence:
    """How much an adapter looks like a part of its base.

    With D = scale * B A and P W Q the projection of the base's matrix W on the column space of B and the row
    space of A: share = <D, W> / ||D||^2 and cosine = <D, P W Q> / (||D|| ||P W Q||), over all matrices looked
    at. Both are 1 for a slice of W (PiSSA, MiLoRA, OLoRA starts). For an adapter that started at zero the
    cosine is near 0, and so is the share unless the update is tiny, which is why both are asked.
    """

    share: float
    cosine: float

    @property
    def is_slice(self) -> bool:
        """True if the adapter started as a part of the base."""
        return self.share > _CLEAR and self.cosine > _CLEAR

    @property
    def is_unclear(self) -> bool:
        """True if it may have."""
        return not self.is_slice and self.share > _UNCLEAR and self.cosine > _CLEAR


def measure_init(delta: AdapterDelta, base: OpenModel) -> InitEvidence:
    """Compare the adapter with a sample of the base's matrices."""
    names = _tensor_names(delta, base)
    modules = [module for module in delta.modules if module in names]
    along = size = projected = 0.0
    for module in _spread(modules):
        factors, scale = delta.trained(module)
        weight_OI = base.source.read(names[module]).float()
        left_OR, right_RI = factors.folded()
        if weight_OI.shape != (left_OR.shape[0], right_RI.shape[1]):
            continue  # refused with a better sentence when the merge is planned
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
    """Raise ArtifactError if an adapter that is taken to have started at zero did not, or may not have."""
    if not delta.is_assumed_zero:
        return
    evidence = measure_init(delta, base)
    if evidence.is_slice or evidence.is_unclear:
        verb = "holds" if evidence.is_slice else "may hold"
        raise ArtifactError(
            f"{delta.directory} {verb} a part of {base.path} itself (share {evidence.share:.2f}), as PiSSA, "
            "MiLoRA and OLoRA start: it belongs to a residual, and in the base that part would count "
            "twice; name what it was trained on with --residual, or its initial adapter with --init, or say "
            "--init none if it started at zero"
        )


def _tensor_names(delta: AdapterDelta, base: OpenModel) -> Mapping[str, str]:
    _, layout = base.layout(delta.layout_name)
    return {slot.module: name for name, slot in layout.slots(base.source.infos).items()}


def _spread(modules: Sequence[str]) -> Sequence[str]:
    step = max(1, len(modules) // _SAMPLE)
    return modules[::step][:_SAMPLE]
