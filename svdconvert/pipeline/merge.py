"""merge: an adapter is merged into the base or its residual, one tensor at a time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import hypot, isfinite
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from svdconvert.checkpoint.parts import with_known_parts
from svdconvert.checkpoint.tensors import tensor_bytes, torch_dtype
from svdconvert.checkpoint.values import cast_finite
from svdconvert.config.execution import Run
from svdconvert.config.options import MergeOptions
from svdconvert.errors import ArtifactError, TargetError
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.tensor_names import joined_product
from svdconvert.linalg.delta import Product, as_lora, merged_, realised_change
from svdconvert.linalg.dora import scaled_rows
from svdconvert.linalg.rounding import stochastic
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.threads import parallel_matrices, pick_device
from svdconvert.manifest.fingerprint import checksum
from svdconvert.manifest.results import KeptUpdate, MergeResult, RecoveredFactors, Update
from svdconvert.manifest.schema import Manifest, roles_of
from svdconvert.manifest.training import Training
from svdconvert.output.plan import PlannedFile
from svdconvert.output.sidecars import complete_checkpoint, read_config, write_config
from svdconvert.output.staging import StagedOutput
from svdconvert.output.tokenizer_files import copy_tokenizer, tokenizer_changes
from svdconvert.pipeline.merge_extras import with_entries
from svdconvert.pipeline.merge_kept import merge_kept, replace_kept
from svdconvert.pipeline.merge_plan import MergePlan
from svdconvert.pipeline.runner import (
    TensorJob,
    TensorResult,
    file_checksums,
    notes,
    source_checksums,
    stream,
)
from svdconvert.quantization.view import is_decoded

FAITHFUL = 0.95
"""A merge warns if the cosine between intended and realised update is below this."""


@dataclass(frozen=True)
class MergeJob:
    """The merge of one adapter."""

    plan: MergePlan
    command: str = "merge"

    @property
    def options(self) -> MergeOptions:
        """The options as the user gave them."""
        return self.plan.options

    @property
    def files(self) -> tuple[PlannedFile, ...]:
        """The shards of the merged model."""
        return self.plan.shards

    @property
    def inputs(self) -> list[Path]:
        """The weights, and every directory that the adapter was read from."""
        return [self.plan.weights.model.path, *self.plan.weights.delta.input_paths()]

    def identity(self) -> dict[str, Any]:
        """The side, the weights and the adapter."""
        weights = self.plan.weights
        return {
            "from": weights.side,
            "weights": weights.model.identity(),
            "adapter": weights.delta.identity(),
        }

    def write(self, staged: StagedOutput, run: Run) -> None:
        """Merge or copy every tensor. Raises ArtifactError for a head that a streamed output cannot hold."""
        weights = self.plan.weights
        if self.plan.added and run.shard_sink is not None:
            raise ArtifactError(
                f"{weights.delta.directory} has a head that the model lacks: merge it without --stream"
            )
        device = pick_device(run.device, run.ranks.local)
        stream(merge_work(self.plan, device), self.plan.source, staged, run)
        if run.ranks.leads:
            _write_added(self.plan, staged)

    def write_sidecars(self, directory: Path) -> None:
        """The model's sidecars, the adapter's own tokenizer, and the head's entries of config.json."""
        weights = self.plan.weights
        keeps = self.plan.kept is not None
        complete_checkpoint(
            weights.model.sidecars,
            directory,
            self.plan.shards,
            dtypes=() if keeps else None,
            was_decoded=weights.model.is_decoded and not keeps,
        )
        copy_tokenizer(weights.delta.directory, directory)
        if self.plan.head:
            write_config(directory, with_entries(read_config(directory), self.plan.head))

    def manifest(self, staged: StagedOutput, threads: int) -> Manifest:
        """The manifest of the merged checkpoint."""
        weights = self.plan.weights
        known = weights.delta.manifest
        origin = weights.model.origin(_known(self.plan, source_checksums(staged)))
        on_base = weights.side == "base"
        recovered = weights.delta.recovered
        return Manifest(
            kind="merged",
            layout=self.plan.layout,
            method=known.method if known else "lora",
            base=origin if on_base else known.base if known else None,
            residual=None if on_base else origin,
            options=asdict(self.options),
            result=MergeResult(
                side=weights.side,
                update=measured_update(notes(staged, self.plan.modules)),
                recovered=RecoveredFactors(by=recovered.way) if recovered else None,
                head=self.plan.head or None,
            ),
            training=weights.delta.training,
            files=file_checksums(staged),
            roles=roles_of(self.files),
            threads=threads,
        )

    def remarks(self, manifest: Manifest) -> Iterator[str]:
        """Which tokenizer was taken; a warning if nothing changed, or if rounding lost too much."""
        weights = self.plan.weights
        if not (self.plan.extras or self.plan.added):
            yield from remark_on_nothing(
                manifest, f"the factors of {weights.delta.directory} are those from before training"
            )
        if taken := tokenizer_changes(weights.delta.directory, weights.model.sidecars):
            yield (
                f"the tokenizer is the adapter's: {', '.join(taken)} of {weights.delta.directory} "
                "differ from the model's"
            )
        if self.options.rounding == "nearest":
            advice = (
                "to-lora keeps all of it, in a LoRA for the untouched base; so does --dtype float32, and "
                "--rounding stochastic on average"
            )
            if self.plan.kept is not None:
                advice = "keep it with --dtype bfloat16 instead of --keep-format, or as a LoRA with to-lora"
            yield from remark_on_rounding(manifest, advice)


def remark_on_nothing(manifest: Manifest, reason: str, base: object = "the base") -> Iterator[str]:
    """A warning if no matrix of `base` was to be changed."""
    assert isinstance(manifest.result, MergeResult)
    if manifest.result.side == "base" and manifest.result.update is None:
        yield f"the merged weights are those of {base}: {reason}"


def remark_on_rounding(manifest: Manifest, advice: str) -> Iterator[str]:
    """A warning if rounding lost too much of some updates, with the share that is left."""
    assert isinstance(manifest.result, MergeResult)
    update = manifest.result.update
    if update is None:
        return
    low = {name: kept.cosine for name, kept in update.matrices.items() if kept.cosine < FAITHFUL}
    if low:
        worst = min(low, key=low.__getitem__)
        yield (
            f"rounding swallows updates in {len(low)} of {len(update.matrices)} matrices: {update.kept:.1%} "
            f"of the training's change is in the merged weights, cosine {update.cosine:.2f} with all of it "
            f"(lowest: {low[worst]:.2f} in {worst}), and as far as it is missing they answer like the "
            f"untrained base; {_in_loss(manifest.training, update)}; {advice}"
        )


def _in_loss(training: Training | None, update: Update) -> str:
    """What the missing part of an update is expected to cost."""
    share = f"about {update.expected_gain:.0%} of what the training gained in loss should remain"
    if training is None or len(training.held_out) < 2:
        return share
    before = training.held_out[0][1]
    points = [loss for _, loss in training.held_out]
    after = min(points) if training.options.get("keep_best") else points[-1]
    expected = before - update.expected_gain * (before - after)
    return (
        f"{share}: a held-out loss near {expected:.4f}, which was {before:.4f} before training and is "
        f"{after:.4f} with all of the change"
    )


_T = TypeVar("_T")


def _known(plan: MergePlan, by_name: Mapping[str, _T]) -> dict[str, _T]:
    """The entries of tensors that are read with the values that `OpenModel.source` shows."""
    if plan.kept is None:
        return dict(by_name)
    shown = with_known_parts(plan.weights.model.source, by_name)
    return {
        name: value
        for name, value in by_name.items()
        if name in shown.infos and (plan.is_kept(name) or not is_decoded(shown, name))
    }


def merge_work(plan: MergePlan, device: torch.device) -> TensorJob:
    """How each tensor of the base or residual is merged or copied."""
    copies = plan.places()
    return TensorJob(
        order=list(copies),
        matrices={**plan.modules, **plan.extras},
        compute=lambda name, stored: _merge_tensor(plan, name, copies[name], stored),
        copies=copies,
        device=device,
        parallelism=parallel_matrices(device),
        expected=_known(plan, plan.weights.expected),
        origin=str(plan.weights.model.path),
    )


def _merge_tensor(plan: MergePlan, name: str, file: str, stored: Tensor) -> TensorResult:
    delta = plan.weights.delta
    _refuse_other_copy(plan, name, stored)
    if name in plan.extras:
        return _replace_tensor(plan, name, file)
    if delta.adapter.config.dora:
        return _merge_dora(plan, name, file, stored)
    on_base = plan.weights.side == "base"
    is_known = on_base or not delta.is_lost
    changes = plan.modules[name]
    rows = stored.shape[1] if changes[0].share.transposed else stored.shape[0]

    def joined(product_of: Callable[[AdapterDelta, str], Product]) -> Product:
        return joined_product([(product_of(delta, one.module), one.share) for one in changes], rows)

    if name in plan.resized:
        stored = delta.parameter(plan.resized[name]).to(stored.device, stored.dtype)
        rows = len(stored)
    update = _to_device_of(joined(module_update), stored) if is_known else None
    if on_base:
        assert update is not None
        product = update
    else:
        product = _to_device_of(joined(adapter_product), stored)
    if plan.kept is not None and plan.is_kept(name):
        return merge_kept(plan.kept, name, file, stored, (product, update))
    dtype = torch_dtype(plan.dtypes[name])
    is_stochastic = plan.options.rounding == "stochastic" and dtype != torch.float32
    generator = Solver(name, seed=plan.options.seed).generator(stored.device) if is_stochastic else None
    intended = None if on_base else update  # by default, all of the product
    merged, realised = merged_(stored, product, dtype, intended, generator)
    if (realised is None or not isfinite(realised.cosine)) and not merged.isfinite().all():
        raise TargetError(
            f"merging {name} gives values that are NaN or Inf: {plan.weights.model.path} holds such values, "
            f"or the result is too large for {str(dtype).removeprefix('torch.')}; check the model, or choose "
            "another --dtype"
        )
    return TensorResult({(file, name): merged}, asdict(realised) if realised and is_known else {})


def _replace_tensor(plan: MergePlan, name: str, file: str) -> TensorResult:
    """A tensor that the adapter trained in full."""
    parameter = plan.extras[name]
    tensor = plan.weights.delta.parameter(parameter)
    if plan.kept is not None and plan.is_kept(name):
        return replace_kept(plan.kept, name, file, tensor)
    return TensorResult({(file, name): cast_finite(parameter, tensor, torch_dtype(plan.dtypes[name]))})


def module_update(delta: AdapterDelta, module: str) -> Product:
    """The change of a module's matrix by training."""
    factors, scale = delta.trained(module)
    return as_lora(factors, scale, *delta.initial(module))


def adapter_product(delta: AdapterDelta, module: str) -> Product:
    """The product of a module's factors."""
    factors, scale = delta.trained(module)
    left, right = factors.folded()
    return left * scale, right


def _merge_dora(plan: MergePlan, name: str, file: str, stored: Tensor) -> TensorResult:
    """Merge a matrix whose rows are scaled to the adapter's magnitudes; it is all of a module's matrix."""
    dtype = torch_dtype(plan.dtypes[name])
    exact = merged_dora(plan, name, stored)
    generator = Solver(name, seed=plan.options.seed).generator(stored.device)
    is_stochastic = plan.options.rounding == "stochastic" and dtype != torch.float32
    merged = stochastic(exact, dtype, generator) if is_stochastic else cast_finite(name, exact, dtype)
    realised = realised_change(stored.float(), exact, merged)
    return TensorResult({(file, name): merged}, asdict(realised) if realised else {})


def merged_dora(plan: MergePlan, name: str, stored: Tensor) -> Tensor:
    """The same in float32, before it is rounded."""
    adapter = plan.weights.delta.adapter
    module = plan.modules[name][0].module
    is_transposed = plan.modules[name][0].share.transposed
    left, right = adapter.factors(module).folded()
    product = _to_device_of((left * adapter.config.scale(module), right), stored)
    weight_OI = stored.T if is_transposed else stored
    exact = scaled_rows(weight_OI, *product, adapter.magnitude(module).to(stored.device))
    return exact.T.contiguous() if is_transposed else exact


def _refuse_other_copy(plan: MergePlan, name: str, stored: Tensor) -> None:
    """Raise ArtifactError if the adapter has its own copy of a base tensor, with other values."""
    delta = plan.weights.delta
    parameter = plan.extras.get(name) or f"{plan.modules[name][0].module}.weight"
    key = delta.adapter.copies.get(parameter)
    if key is None or delta.initial_adapter is not None or name in plan.resized or name in plan.extras:
        return
    if is_decoded(plan.source, name):  # the adapter's program has the decoded values as rounded
        dtype = torch_dtype(plan.weights.model.source.infos[name].dtype)
    else:
        dtype = stored.dtype
    copy = delta.adapter.source.read(key).to(stored.device, dtype)
    if not torch.equal(copy, stored.to(dtype)):
        raise ArtifactError(
            f"{delta.directory} has its own {key}, which differs from {name} of {plan.weights.model.path}: "
            "it was trained on another model; give that with --base"
        )


def _to_device_of(product: Product, like: Tensor) -> Product:
    return product[0].to(like.device), product[1].to(like.device)


def _write_added(plan: MergePlan, staged: StagedOutput) -> None:
    """Write the tensors of a head that the model does not have."""
    files = {info.name: file.path for file in plan.shards for info in file.infos}
    delta = plan.weights.delta
    for name, new in plan.added.items():
        if name in staged.finished:
            continue
        dtype = torch_dtype(plan.dtypes[name])
        own = new.parameter
        tensor = plan.source.read(new.copied) if own is None else delta.parameter(own)
        if new.module is not None:
            product = (module_update if plan.weights.side == "base" else adapter_product)(delta, new.module)
            tensor, _ = merged_(tensor.clone(), product, dtype, None, None)
        tensor = cast_finite(name, tensor, dtype).contiguous()
        staged.write(files[name], name, tensor)
        staged.finish(name, {"files": {files[name]: {name: checksum(tensor_bytes(tensor))}}})


def measured_update(notes: Mapping[str, Mapping[str, Any]]) -> Update | None:
    """How much of the intended update the merged matrices hold, over all of them and by tensor.

    None if no matrix was to be changed, or if the intended update is not known.
    """
    found = {name: KeptUpdate(**note) for name, note in notes.items() if note}
    if not found:
        return None
    intended = hypot(*(one.size for one in found.values()))
    # <u, v> of all matrices is the sum over matrices of kept * size^2; ||v|| of one is kept * size / cosine.
    along = sum(one.kept * one.size**2 for one in found.values())
    realised = hypot(*(one.kept * one.size / one.cosine for one in found.values() if one.cosine))
    cosine = along / (intended * realised) if realised else 0.0
    return Update(cosine=cosine, kept=along / intended**2, matrices=found)
