"""Where training starts: which weights are loaded, and the factors beside them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from svdconvert.adapters.adapter_config import PER_EXPERT, AdapterConfig
from svdconvert.adapters.extra_parameters import extra_key
from svdconvert.adapters.peft_files import WEIGHTS, adapter_infos, key, open_adapter
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource, dtype_code, tensor_bytes
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.config.progress import Progress, Track
from svdconvert.errors import ArtifactError
from svdconvert.hub.download import fetch
from svdconvert.inputs.model import open_model, require_model
from svdconvert.linalg.factors import Factors
from svdconvert.manifest.fingerprint import checksum
from svdconvert.manifest.schema import PLAIN, Manifest, Matrix, Origin, has_manifest, read_manifest
from svdconvert.methods.base import METHODS, init_folder
from svdconvert.output.plan import PlannedFile, plan_file
from svdconvert.output.staging import StagedOutput
from svdconvert.pipeline.decompose import DecomposePlan, plan_decomposition, split_tensor


@dataclass(frozen=True, kw_only=True)
class TrainingStart:
    """An adapter before training."""

    weights: Path
    """The directory that is loaded: the residual, or the base."""
    method: str
    layout: str
    base_is_residual: bool
    """True where the weights are a residual, or `replaced` makes them one."""
    config: AdapterConfig
    base: Origin | None
    residual: Origin | None
    matrices: Mapping[str, Matrix]
    factors: Mapping[str, Factors]
    """Module -> initial factors."""
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    """Module -> residual, where `weights` holds the base and the method trains against a residual."""
    whole: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the parameters that are trained whole beside the factors."""

    def pieces(self) -> dict[str, tuple[Factors, float]]:
        """Module -> (factors, scale)."""
        return {module: (factors, self.config.scale(module)) for module, factors in self.factors.items()}


def start_from_decomposed(
    directory: Path, manifest: Manifest, weights: Path, residual: Origin | None
) -> TrainingStart:
    """The start that `decompose` wrote; `weights` is the directory or, without a residual, the base."""
    adapter = open_adapter(directory / init_folder(manifest.method))
    return TrainingStart(
        weights=weights,
        method=manifest.method,
        layout=manifest.layout,
        base_is_residual=manifest.base_is_residual,
        config=adapter.config,
        base=manifest.base,
        residual=residual,
        matrices=manifest.matrices,
        factors={module: adapter.factors(module) for module in adapter.modules},
    )


def start_from_plain(
    plan: DecomposePlan, source: TensorSource, weights: Path, base: Origin, track: Track
) -> TrainingStart:
    """Split the matrices of a plain checkpoint in memory, as `decompose` would on disk."""
    matrices: dict[str, Matrix] = {}
    factors: dict[str, Factors] = {}
    replaced: dict[str, Tensor] = {}
    marks: dict[str, str] = {}
    total = sum(source.infos[name].nbytes for name in plan.slots)
    done = 0
    for name in plan.slots:
        stored = source.read(name)
        marks[name] = checksum(tensor_bytes(stored))
        split, base_OI, matrix = split_tensor(plan, name, stored, alone=True)
        matrices[name], factors[matrix.module] = matrix, split
        if plan.method.residual:
            replaced[matrix.module] = base_OI
        done += source.infos[name].nbytes
        track(Progress(name, "", done, total))
    return TrainingStart(
        weights=weights,
        method=plan.options.method,
        layout=plan.layout,
        base_is_residual=plan.method.residual,
        config=plan.adapter_config(),
        base=replace(base, fingerprint=replace(base.fingerprint, tensors=marks)),
        residual=None,
        matrices=matrices,
        factors=factors,
        replaced=replaced,
    )


def start_whole(method: str, layout: str, weights: Path, base: Origin) -> TrainingStart:
    """A plain checkpoint that is trained itself, without an adapter."""
    return TrainingStart(
        weights=weights,
        method=method,
        layout=layout,
        base_is_residual=False,
        config=AdapterConfig(rank=1, alpha=1.0, targets=()),
        base=base,
        residual=None,
        matrices={},
        factors={},
    )


def plan_adapter(
    path: str,
    factors: Mapping[str, Factors],
    dtype: torch.dtype | None = None,
    whole: Mapping[str, tuple[int, ...]] | None = None,
) -> PlannedFile:
    """The adapter's file at `path`: factors in `dtype` or as they are, what is trained whole in float32."""
    infos = []
    for module, parts in factors.items():
        for piece, tensor in parts.pieces().items():
            infos += adapter_infos(module, {piece: tuple(tensor.shape)}, dtype_code(dtype or tensor.dtype))
    infos += [TensorInfo(extra_key(name, factors), shape, "F32") for name, shape in (whole or {}).items()]
    return plan_file(path, infos, "adapter" if path == WEIGHTS else "initial_adapter")


def write_adapter(
    staged: StagedOutput,
    file: PlannedFile,
    factors: Mapping[str, Factors],
    whole: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """Write every piece; checksums by name."""
    tensors = {key(path, piece): t for path, parts in factors.items() for piece, t in parts.pieces().items()}
    tensors |= {extra_key(name, factors): tensor for name, tensor in (whole or {}).items()}
    for name, tensor in tensors.items():
        staged.write(file.path, name, tensor)
    return {name: checksum(tensor_bytes(tensor)) for name, tensor in tensors.items()}


def open_training_start(model: str, split: SplitOptions, base: str | None, run: Run) -> TrainingStart:
    """The adapter that `decompose` wrote, or one that `split` starts on a plain `model`.

    `base` says where the base is, for methods that leave it as it is. Raises ArtifactError for what cannot
    be trained.
    """
    start = _found(model, split, base, run)
    if start.config.peft_type == PER_EXPERT:
        raise ArtifactError(
            f"{model} adapts experts one by one, which transformers fuses at run time, beyond the trainer; "
            "decompose with --targets attn, or train it elsewhere"
        )
    return start


def _found(model: str, split: SplitOptions, base: str | None, run: Run) -> TrainingStart:
    snapshot = fetch(model)
    if not has_manifest(snapshot.path) or read_manifest(snapshot.path).kind in PLAIN:
        home = open_model(model)
        if METHODS.get(split.method).split is None:
            return start_whole(split.method, home.layout(split.layout)[0], home.path, home.origin())
        return start_from_plain(
            plan_decomposition(home, split), home.source, home.path, home.origin(), run.track
        )
    manifest = read_manifest(snapshot.path)
    if manifest.kind != "decomposed":
        raise ArtifactError(
            f"{snapshot.path} is a {manifest.kind} directory; train wants what decompose wrote, or a model"
        )
    if manifest.base_is_residual:
        home = open_model(model)
        return start_from_decomposed(home.path, manifest, home.path, home.origin(manifest.checksums))
    found = require_model(manifest.base, base, snapshot.path)
    return start_from_decomposed(snapshot.path, manifest, found.path, None)
