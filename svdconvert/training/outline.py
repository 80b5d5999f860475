"""What a training run starts from, as headers and manifests tell it: no weights are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.errors import ArtifactError
from svdconvert.hub.download import Snapshot, fetch
from svdconvert.inputs.model import OpenModel, find_model, open_headers
from svdconvert.layouts.base import Layout
from svdconvert.manifest.schema import PLAIN, has_manifest, read_manifest
from svdconvert.methods.base import METHODS, Method
from svdconvert.pipeline.adapter_targets import matrix_shape
from svdconvert.pipeline.decompose_plan import plan_decomposition
from svdconvert.pipeline.estimate import estimate_decompose
from svdconvert.quantization.view import DecodedSource
from svdconvert.training.start import decomposed_manifest, refuse_adapter_options

_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A model to load and an adapter to train, or a model of which everything is trained."""

    model: OpenModel
    """Its headers; the weights that are loaded."""
    layout: Layout
    method: Method
    name: str
    """The method's."""
    matrices: Mapping[str, tuple[int, int, int]]
    """Tensor -> (rows, columns, rank) of the adapted matrices; empty without an adapter."""
    width: int = 4
    """Bytes of a value of the initial adapter."""
    dropout: float = 0.0
    seconds: float = 0.0
    """To split a plain model in memory first, estimated."""
    split_bytes: int = 0
    """Bytes of the residuals that are made in memory while the model is loaded."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """All tensors of the model; quantised ones as they are decoded."""
        return self.model.source.infos

    @property
    def values(self) -> int:
        """How many values the model has."""
        return sum(prod(info.shape) for info in self.infos.values())

    @property
    def stored_bytes(self) -> int:
        """Of the model as it is stored."""
        source = self.model.source
        stored = source.stored if isinstance(source, DecodedSource) else source
        return sum(info.nbytes for info in stored.infos.values())

    @property
    def trained_values(self) -> int:
        """How many values of factors are trained; without an adapter those of the model."""
        if self.method.split is None:
            return self.values
        return sum(self.method.trained_values(*shape) for shape in self.matrices.values())

    @property
    def adapter_values(self) -> int:
        """How many values the factors have, trained or not."""
        shapes = [self.method.factor_shapes(*shape) for shape in self.matrices.values()]
        return sum(prod(shape) for each in shapes for shape in each.values())


def outline_run(model: str, split: SplitOptions, base: str | None, run: Run) -> Outline:
    """What `open_training_start` would open. Raises SvdConvertError as it does."""
    snapshot = fetch(model, "sidecars")
    if has_manifest(snapshot.path) and read_manifest(snapshot.path).kind not in PLAIN:
        return _decomposed(model, snapshot, base, split)
    if base is not None:
        raise ArtifactError(f"--base {base} changes nothing: {model} is a base itself; leave it out")
    opened = open_headers(model, trust_remote_code=run.trust_remote_code)
    if METHODS.get(split.method).split is None:
        refuse_adapter_options(split)
        return Outline(
            model=opened,
            layout=opened.layout(split.layout)[1],
            method=METHODS.get(split.method),
            name=split.method,
            matrices={},
        )
    plan = plan_decomposition(opened, split)
    shapes = {name: matrix_shape(plan.infos[name], slot) for name, slot in plan.slots.items()}
    return Outline(
        model=opened,
        layout=plan.layout_in_use,
        method=plan.method,
        name=split.method,
        matrices={name: (*shape, plan.scalings[name].rank) for name, shape in shapes.items()},
        width=_WIDTH[split.dtype],
        dropout=split.dropout,
        seconds=estimate_decompose(plan).seconds,
        split_bytes=sum(plan.infos[name].nbytes for name in plan.slots) if plan.method.residual else 0,
    )


def _decomposed(model: str, snapshot: Snapshot, base: str | None, split: SplitOptions) -> Outline:
    manifest = decomposed_manifest(snapshot.path, split)
    if manifest.base_is_residual:
        opened = open_headers(model)
        if base is not None:
            find_model(manifest.base, base, stream=True)
    else:
        found = find_model(manifest.base, base, stream=True)
        if found is None:
            location = manifest.base.location if manifest.base else "unknown"
            raise ArtifactError(
                f"the base of {snapshot.path} is not found ({location}); give its location with --base"
            )
        opened = found
    return Outline(
        model=opened,
        layout=opened.layout(manifest.layout)[1],
        method=METHODS.get(manifest.method).variant(manifest.options.get("init")),
        name=manifest.method,
        matrices={name: (*one.shape, one.rank) for name, one in manifest.matrices.items()},
        width=_WIDTH.get(str(manifest.options.get("dtype")), 4),
        dropout=float(manifest.options.get("dropout") or 0.0),
    )
