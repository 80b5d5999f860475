"""What training starts from: an adapter with the weights that it belongs to, or an entire checkpoint."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from svdconvert.adapters.adapter_config import AdapterConfig
from svdconvert.adapters.peft_files import open_adapter
from svdconvert.adapters.stacked import stack_factors
from svdconvert.checkpoint.parts import with_known_parts
from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.config.progress import report
from svdconvert.errors import ArtifactError, RecipeError
from svdconvert.hub.download import Snapshot, fetch
from svdconvert.inputs.model import OpenModel, find_model, layout_of_weights, open_model, require_model
from svdconvert.inputs.placed import Projection, projections_of
from svdconvert.linalg.factors import Factors
from svdconvert.manifest.fingerprint import Checksum, tensor_checksum
from svdconvert.manifest.schema import PLAIN, Manifest, Matrix, Origin, has_manifest, read_manifest
from svdconvert.methods.base import METHODS, init_folder
from svdconvert.pipeline.decompose import split_tensor
from svdconvert.pipeline.decompose_plan import DecomposePlan, plan_decomposition
from svdconvert.pipeline.quantised_plan import decoded_dtype
from svdconvert.quantization.nf4 import Quantized
from svdconvert.quantization.view import read_to_compute
from svdconvert.training.model.extra_parameters import choose_parameters
from svdconvert.training.model.inject import ScaledFactors
from svdconvert.training.model.quantised_linear import QuantisedWeight
from svdconvert.training.model.quantised_loading import weight_in_memory


@dataclass(frozen=True, kw_only=True)
class AdapterStart:
    """An initial adapter, and the frozen weights that it is trained with."""

    model: OpenModel
    """What is loaded: a residual or a base."""
    inputs: Sequence[Path]
    """All directories and files that were read."""
    method: str
    layout: str
    base_is_residual: bool
    """True if `model` holds residuals, or `residuals` replaces the target matrices by residuals."""
    config: AdapterConfig
    base: Origin | None
    residual: Origin | None
    matrices: Mapping[str, Matrix]
    """Tensor of the base -> what is known about it."""
    factors: Mapping[str, Factors]
    """Module -> initial factors."""
    residuals: Mapping[str, Tensor | QuantisedWeight] = field(default_factory=dict)
    """Tensor of the base -> its residual, if `model` is the base and the method needs a residual."""
    fully_trained: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Path -> shape of the parameters that are trained in full, in addition to the factors."""

    @property
    def weights(self) -> Path:
        """The directory or file that the network and the tokenizer are loaded from."""
        return self.model.sidecars

    def scaled_factors(self) -> ScaledFactors:
        """Module -> (factors, scale)."""
        return {module: (factors, self.config.scale(module)) for module, factors in self.factors.items()}

    def projections(self) -> dict[str, Projection]:
        """Module -> its place, for the experts that have factors of their own."""
        return {
            projection.module: projection
            for matrix in self.matrices.values()
            if matrix.place is not None
            for projection in projections_of(matrix.module, matrix.place, matrix.shape[0])
        }

    def network_paths(self) -> dict[str, str]:
        """Module, as the adapter names it -> its path in the network."""
        layout = layout_of_weights(self.layout, self.weights)
        return {matrix.module: layout.network_path(name) for name, matrix in self.matrices.items()}


@dataclass(frozen=True, kw_only=True)
class FullStart:
    """A plain checkpoint of which every weight is trained, without an adapter."""

    model: OpenModel
    """The only input."""
    method: str
    layout: str
    base: Origin

    @property
    def weights(self) -> Path:
        """The directory or file that the network and the tokenizer are loaded from."""
        return self.model.sidecars

    @property
    def inputs(self) -> Sequence[Path]:
        """All directories and files that were read."""
        return [self.model.path]


TrainingStart = AdapterStart | FullStart


def open_training_start(
    model: str, split: SplitOptions, base: str | None, run: Run, train_also: Sequence[str] = ()
) -> TrainingStart:
    """Open what `decompose` wrote, or decompose a plain `model` in memory as `split` says.

    `base` overrides the location of the base, for methods that leave the base unchanged. `train_also` chooses
    parameters to train in full in addition to an adapter; it is ignored if there is no adapter. Raises
    ArtifactError for a directory that cannot be trained, or whose weights have changed since svdconvert wrote
    it, RecipeError if `train_also` cannot be followed.
    """
    snapshot = fetch(model)
    if has_manifest(snapshot.path) and read_manifest(snapshot.path).kind not in PLAIN:
        start, opened = _open_decomposed(model, snapshot, base, split)
    else:
        if base is not None:
            raise ArtifactError(f"--base {base} changes nothing: {model} is a base itself; leave it out")
        opened = open_model(model, trust_remote_code=run.trust_remote_code)
        if METHODS.get(split.method).split is None:
            refuse_adapter_options(split)
            opened.require_unchanged()
            return FullStart(
                model=opened,
                method=split.method,
                layout=opened.layout(split.layout)[0],
                base=opened.origin(),
            )
        start = start_from_plain(plan_decomposition(opened, split), opened)
    opened.require_unchanged()
    if not train_also:
        return start
    layout = layout_of_weights(start.layout, start.weights)
    return replace(
        start, fully_trained=choose_parameters(opened.source.infos, layout, start.matrices, train_also)
    )


def refuse_adapter_options(split: SplitOptions) -> None:
    """Raise RecipeError for options of an adapter if the method trains without one."""
    if others := _differing(split, asdict(SplitOptions(method=split.method, layout=split.layout))):
        raise RecipeError(
            f"`{others[0]}` changes nothing here: {split.method} trains every weight, without an adapter; "
            "leave it out"
        )


def _open_decomposed(
    model: str, snapshot: Snapshot, base: str | None, split: SplitOptions
) -> tuple[AdapterStart, OpenModel]:
    """The start that `decompose` wrote, and the opened weights: the directory itself, or the base.

    Raises ArtifactError if a stored tensor has changed since.
    """
    manifest = decomposed_manifest(snapshot.path, split)
    if manifest.base_is_residual:
        if base is not None:
            find_model(manifest.base, base, stream=True)  # not needed, but a wrong one is an error
        opened = open_model(model)
        residual = opened.origin(manifest.checksums)
        return start_from_decomposed(opened.path, manifest, opened, residual), opened
    opened = require_model(manifest.base, base, snapshot.path)
    if manifest.base is not None:
        known = manifest.base.fingerprint.tensors
        require_unchanged(opened.path, opened.source, known, "the adapter was made")
    return start_from_decomposed(snapshot.path, manifest, opened, None), opened


def decomposed_manifest(directory: Path, split: SplitOptions) -> Manifest:
    """The manifest of what `decompose` wrote.

    Raises ArtifactError for a directory of another kind, RecipeError if `split` asks for another split.
    """
    manifest = read_manifest(directory)
    if manifest.kind != "decomposed":
        raise ArtifactError(
            f"{directory} is a {manifest.kind} directory; train needs what decompose wrote, or a model"
        )
    if others := _other_options(manifest, split):
        raise RecipeError(_other_split(directory, manifest, ", ".join(others)))
    return manifest


def split_for(
    model: str, split: SplitOptions, typed: Collection[str], notify: Callable[[str], None]
) -> SplitOptions | None:
    """`split` for a plain model, None for a decomposed directory, whose split is fixed.

    `typed` are the options that were typed: for a decomposed directory they are refused with a RecipeError.
    If only a recipe, which may hold the options of all commands, differs from the directory, `notify` is
    called with a sentence.
    """
    if METHODS.get(split.method).split is None:
        split = _without_adapter(split, typed)
    if not typed and replace(split, seed=SplitOptions().seed) == SplitOptions():
        return split
    path = fetch(model, "sidecars").path
    if not has_manifest(path) or (manifest := read_manifest(path)).kind in PLAIN:
        return split
    if typed:
        raise RecipeError(_other_split(path, manifest, ", ".join(typed)))
    if others := _other_options(manifest, split):
        notify(f"{path} keeps its own split: {', '.join(others)} of the recipe would need another decompose")
    return None


def _without_adapter(split: SplitOptions, typed: Collection[str]) -> SplitOptions:
    """The options without those of an adapter that only a recipe has. Raises RecipeError if one was typed."""
    if others := [name for name in typed if name != "--method"]:
        raise RecipeError(
            f"{others[0]} changes nothing here: {split.method} trains every weight, without an adapter; "
            "leave it out"
        )
    return SplitOptions(method=split.method, layout=split.layout)


def _differing(split: SplitOptions, others: Mapping[str, Any]) -> list[str]:
    """The options whose values differ from `others`; the seed may, as it belongs to the training too."""
    return [name for name, value in asdict(split).items() if name != "seed" and value != others[name]]


def _other_options(manifest: Manifest, split: SplitOptions) -> list[str]:
    """The options with which `split` asks for another decomposition than the directory has.

    The seed of a recipe belongs to the training too, so it may differ.
    """
    asked = json.loads(json.dumps(asdict(split)))
    usual = json.loads(json.dumps(asdict(SplitOptions())))
    return [
        name
        for name, value in asked.items()
        if name != "seed" and value != usual[name] and value != manifest.options.get(name, value)
    ]


def _other_split(directory: Path, manifest: Manifest, names: str) -> str:
    rank = manifest.options.get("rank")
    made = f"by {manifest.method}" if rank is None else f"by {manifest.method} at rank {rank}"
    return (
        f"{directory} is decomposed already, {made}, so {names} would change nothing; decompose the model "
        f"again for another split, or leave {names} out"
    )


def require_unchanged(path: Path, source: TensorSource, known: Mapping[str, str], when: str) -> None:
    """Raise ArtifactError if a tensor has not its known checksum any more."""
    source = with_known_parts(source, known)
    total = sum(source.infos[name].nbytes for name in known if name in source.infos)
    done = 0
    for name, mark in known.items():
        report("check", done, total, "bytes", name=name)
        if name not in source.infos:
            raise ArtifactError(f"{path} does not have {name} any more; restore the file")
        if tensor_checksum(source, name) != mark:
            raise ArtifactError(f"{path}: {name} has changed since {when}; restore the file")
        done += source.infos[name].nbytes


def start_from_decomposed(
    directory: Path, manifest: Manifest, model: OpenModel, residual: Origin | None
) -> AdapterStart:
    """The start that `decompose` wrote; `model` is that directory or, without a residual, the base."""
    adapter = open_adapter(directory / init_folder(manifest.method))
    return AdapterStart(
        model=model,
        inputs=[directory, model.path],
        method=manifest.method,
        layout=manifest.layout,
        base_is_residual=manifest.base_is_residual,
        config=adapter.config,
        base=manifest.base,
        residual=residual,
        matrices=manifest.matrices,
        factors={module: adapter.factors(module) for module in adapter.modules},
    )


def start_from_plain(plan: DecomposePlan, model: OpenModel) -> AdapterStart:
    """Decompose the target matrices of a plain checkpoint in memory, as `decompose` does on disk."""
    source = plan.layout_in_use.divided(model.source)
    matrices: dict[str, Matrix] = {}
    factors: dict[str, Factors] = {}
    residuals: dict[str, Tensor | QuantisedWeight] = {}
    checksums: dict[str, str] = {}
    total_bytes = sum(source.infos[name].nbytes for name in plan.slots)
    done_bytes = 0
    for name in plan.slots:
        hasher = Checksum()
        stored = read_to_compute(source, name, on_chunk=hasher.update)
        checksums[name] = hasher.text()
        initial, base, matrices[name] = split_tensor(plan, name, stored, alone=True)
        factors |= {piece.module: piece.of(initial) for piece in plan.adapter.pieces[name]}
        if isinstance(base, Quantized):
            residuals[name] = weight_in_memory(base, decoded_dtype(plan.infos[name]))
        elif plan.method.residual:
            residuals[name] = base
        done_bytes += source.infos[name].nbytes
        report("decompose", done_bytes, total_bytes, "bytes", name=name)
    for stack in plan.adapter.stacks:
        own = {member.module: factors.pop(member.module) for member in stack.members}
        factors |= stack_factors(stack, own)
    return AdapterStart(
        model=model,
        inputs=[model.path],
        method=plan.options.method,
        layout=plan.layout,
        base_is_residual=plan.base_is_residual,
        config=plan.adapter.config,
        base=model.origin(checksums),
        residual=None,
        matrices=matrices,
        factors=factors,
        residuals=residuals,
    )
