"""verify --merged: how a merge that any program made relates to the base and the adapter.

Every adapted matrix is compared with what the known orders of rounding give, every other tensor with that of
the base.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import TensorSource, same_bytes
from svdconvert.config.display import Shown
from svdconvert.config.execution import Run
from svdconvert.config.options import MergeOptions
from svdconvert.config.progress import report
from svdconvert.inputs.merge_weights import MergeWeights
from svdconvert.inputs.model import OpenModel
from svdconvert.inputs.tensor_names import joined_product
from svdconvert.linalg.delta import Product, merged_
from svdconvert.linalg.gemm import matmul_f32
from svdconvert.linalg.threads import float32_products
from svdconvert.manifest.fingerprint import tensor_checksum
from svdconvert.pipeline.merge import merged_dora, module_update
from svdconvert.pipeline.merge_plan import MergePlan, plan_merge
from svdconvert.quantization.view import is_decoded, read_to_compute

# PEFT 0.21 adds a float32 change to half-precision weights under one rounding; with safe_merge, or if the
# factors are in half precision, it rounds the change first (tuners/lora/layer.py, Linear.merge). The weights
# of a quantised base are rounded before that, when they are decoded.
Rule = Literal["one rounding", "PEFT's order", "unchanged", "something else"]
RIGHT: tuple[Rule, ...] = ("one rounding", "PEFT's order")
"""What a matrix with the adapter in it can be."""
_STRAY = 2e-3  # share of entries that may be rounded to the other neighbour: sums in another order
_FLOAT32 = 1e-6  # of ||W||_F, that sums in another order change in float32


@dataclass(frozen=True, slots=True)
class AuditedMatrix:
    """One adapted matrix of the merged checkpoint."""

    name: str
    rule: Rule
    exact: float
    """The share of its entries that equal, bit for bit, W + sBA in float32 under one rounding; of DoRA the
    same with its magnitudes."""
    times: float | None = None
    """The multiple of sBA that fits its change best; None if sBA is zero."""
    rest: float | None = None
    """The share of its change's norm that no multiple of sBA explains; None if it did not change."""

    @property
    def fault(self) -> str | None:
        """What is wrong, in words; None if the adapter is in it."""
        if self.rule in RIGHT:
            return None
        if self.rule == "unchanged":
            return "is the base's: the adapter is not in it"
        if self.times is None or self.rest is None:
            return "differs from the base, which the adapter does not change here"
        if self.rest < 0.5:
            return f"has {self.times:.3f} times the adapter's change ({self.rest:.0%} of it is unexplained)"
        return f"differs from the base in another way ({self.rest:.0%} of the change is unexplained)"


@dataclass(frozen=True)
class BaseAudit:
    """A merged checkpoint against one base."""

    base: str
    matrices: list[AuditedMatrix]
    faults: list[str]
    """One sentence for each tensor that is not what the merge should have written."""

    @property
    def passed(self) -> bool:
        """True if every tensor is what a merge into this base gives."""
        return not self.faults

    @property
    def rules(self) -> Mapping[Rule, int]:
        """How many matrices each rule explains."""
        return Counter(matrix.rule for matrix in self.matrices)


@dataclass(frozen=True, repr=False)
class MergeAudit(Shown):
    """A merged checkpoint against each base that was given."""

    merged: str
    adapter: str
    bases: list[BaseAudit]

    def shown_as(self) -> Mapping[str, object]:
        """Whether a base fits, and which."""
        return {
            "merged": self.merged,
            "adapter": self.adapter,
            "passed": self.passed,
            "bases": len(self.bases),
            "best": self.best.base,
            "faults": len(self.best.faults) or None,
        }

    @property
    def best(self) -> BaseAudit:
        """The base that fits, or else the one with the fewest faults."""
        return min(self.bases, key=lambda audit: len(audit.faults))

    @property
    def passed(self) -> bool:
        """True if one of the bases fits."""
        return self.best.passed


def audit_merge(merged: OpenModel, weights: MergeWeights, run: Run) -> BaseAudit:
    """Compare every tensor of `merged` with what merging the adapter into the base gives."""
    plan = plan_merge(weights, MergeOptions())
    faults: list[str] = []
    matrices: list[AuditedMatrix] = []
    layout = merged.layout(plan.layout)[1]
    found = layout.divided(merged.source)
    names = [*plan.source.infos]
    with float32_products():
        for done, name in enumerate(names, 1):
            if fault := _misfit(plan, found, name):
                faults.append(fault)
            elif name in plan.modules:
                matrices.append(_audit_matrix(plan, found, name))
                if fault := matrices[-1].fault:
                    faults.append(f"{name} {fault}")
            elif fault := _other_fault(plan, found, name):
                faults.append(f"{name} {fault}")
            report("verify", done, len(names), "tensors", name=name)
    faults += _unexpected(plan, found)
    return BaseAudit(weights.model.snapshot.name, matrices, faults)


def _misfit(plan: MergePlan, merged: TensorSource, name: str) -> str | None:
    """What is wrong if the merged checkpoint lacks a tensor, or has it with another shape."""
    if name not in merged.infos:
        return None if name.endswith("lm_head.weight") else f"{name} is missing"
    found = merged.infos[name].shape
    before = plan.source.infos[name].shape
    own = plan.extras.get(name) or plan.resized.get(name)
    wanted = plan.weights.delta.adapter.parameter_info(own).shape if own else before
    return None if found == wanted else f"{name} has the shape {found}, and {before} in the base"


def _unexpected(plan: MergePlan, merged: TensorSource) -> Iterator[str]:
    """Tensors of the merged checkpoint that neither the base nor the adapter has."""
    for name in merged.infos:
        if name not in plan.source.infos and name not in plan.added and not name.endswith("lm_head.weight"):
            yield f"{name} is neither in the base nor in the adapter"


def _other_fault(plan: MergePlan, merged: TensorSource, name: str) -> str | None:
    """What is wrong with a tensor that has no factors: it must be the adapter's, or else the base's."""
    base = plan.source
    if name not in merged.infos:
        return None
    if name in plan.extras:
        trained = plan.weights.delta.parameter(plan.extras[name])
        found = merged.read(name)
        return None if torch.equal(trained.to(found.dtype), found) else "is not the one trained in full"
    if merged.infos[name].dtype == base.infos[name].dtype:
        same = tensor_checksum(merged, name) == tensor_checksum(base, name)
    else:
        found = merged.read(name)
        same = torch.equal(base.read(name).to(found.dtype), found)
    return None if same else "differs from the base, and the adapter has nothing for it"


def _audit_matrix(plan: MergePlan, merged: TensorSource, name: str) -> AuditedMatrix:
    found = merged.read(name)
    weight = read_to_compute(plan.source, name)
    if name in plan.resized:
        weight = plan.weights.delta.parameter(plan.resized[name]).to(weight.dtype)
    unchanged = weight.to(found.dtype)
    once, in_peft, update = _right_results(plan, name, weight, found.dtype)
    exact = float((once == found).double().mean())
    if _same(once, found):
        return AuditedMatrix(name, "one rounding", exact)
    if any(_same(each, found) for each in in_peft):
        return AuditedMatrix(name, "PEFT's order", exact)
    if _same(unchanged, found):
        return AuditedMatrix(name, "unchanged", exact, 0.0)
    size = float(torch.linalg.vector_norm(weight.float()))
    if _nearly(once, found, size):
        return AuditedMatrix(name, "one rounding", exact)
    if any(_nearly(each, found, size) for each in in_peft):
        return AuditedMatrix(name, "PEFT's order", exact)
    return AuditedMatrix(
        name, "something else", exact, *_fit(found.double() - weight.double(), update.double())
    )


def _right_results(
    plan: MergePlan, name: str, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], Tensor]:
    """(the merged matrix under one rounding, what PEFT's orders of rounding give, the change in float32)."""
    if plan.weights.delta.adapter.config.dora:
        wanted = merged_dora(plan, name, weight)
        once = wanted.to(dtype)
        return once, [once], wanted - weight.float()
    product, update = _changes(plan, name, weight)
    unchanged = weight.to(dtype)
    in_peft = [unchanged + update.to(dtype)]
    if is_decoded(plan.source, name):
        in_peft.append(merged_(unchanged.clone(), product, dtype)[0])
    return merged_(weight.clone(), product, dtype)[0], in_peft, update


def _changes(plan: MergePlan, name: str, weight: Tensor) -> tuple[Product, Tensor]:
    """(the change as a product, the change as PEFT computes it: (B A) * scale in float32)."""
    delta = plan.weights.delta
    changes = plan.modules[name]
    rows = weight.shape[1] if changes[0].share.transposed else weight.shape[0]
    product = joined_product([(module_update(delta, one.module), one.share) for one in changes], rows)
    scales = {delta.adapter.config.scale(one.module) for one in changes}
    if len(scales) > 1 or any(delta.initial(one.module)[0].left_OR.any() for one in changes):
        return product, matmul_f32(*product)
    factors = [(delta.trained(one.module)[0].folded(), one.share) for one in changes]
    return product, matmul_f32(*joined_product(factors, rows)) * scales.pop()


def _same(one: Tensor, other: Tensor) -> bool:
    return same_bytes(one, other) or torch.equal(one, other)


def _nearly(wanted: Tensor, found: Tensor, size: float) -> bool:
    """True if the two differ only as sums in another order do; `size` is ||W||_F."""
    distance = (wanted.double() - found.double()).abs()
    if found.dtype == torch.float32 or found.dtype == torch.float64:
        return float(torch.linalg.vector_norm(distance)) <= _FLOAT32 * size
    # Neighbours in half precision differ by at most eps times the larger one.
    spacing = torch.finfo(found.dtype).eps * wanted.double().abs() + torch.finfo(found.dtype).tiny
    stray = int((distance > 0).sum())
    return bool((distance <= spacing).all()) and stray <= max(1.0, _STRAY * found.numel())


def _fit(change: Tensor, update: Tensor) -> tuple[float | None, float | None]:
    """(the multiple of the update that is nearest to the change, the share of the change that is left)."""
    square = float(update.square().sum())
    norm = float(torch.linalg.vector_norm(change))
    if not square or not norm:
        return (None, None) if not square else (0.0, None)
    times = float((change * update).sum()) / square
    return times, float(torch.linalg.vector_norm(change - times * update)) / norm
