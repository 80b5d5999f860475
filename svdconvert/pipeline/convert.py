"""convert: a checkpoint is written with the names of another layout, one tensor at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from svdconvert.checkpoint.renamed import RenamedSource, as_family, as_layout, with_zeros
from svdconvert.checkpoint.tensors import ELEMENTS, REAL, TensorInfo, torch_dtype
from svdconvert.checkpoint.values import cast_finite
from svdconvert.config.execution import Run
from svdconvert.config.options import ConvertOptions
from svdconvert.config.sizes import parse_size
from svdconvert.errors import TargetError
from svdconvert.inputs.model import OpenModel
from svdconvert.layouts.base import Layout
from svdconvert.layouts.detect import in_family
from svdconvert.manifest.schema import Manifest, roles_of
from svdconvert.output.plan import PlannedFile, plan_model
from svdconvert.output.sidecars import complete_checkpoint, write_config
from svdconvert.output.staging import StagedOutput
from svdconvert.pipeline.effects import refuse_idle_shard_size
from svdconvert.pipeline.runner import TensorJob, TensorResult, file_checksums, stream

_CODE = ("config.json", "configuration_*.py", "modeling_*.py")
"""Files of the source that describe its own layout and are not copied to another one."""


@dataclass(frozen=True)
class ConvertPlan:
    """What will be written, planned from headers alone."""

    name: str
    """The name of the layout."""
    view: RenamedSource
    """The source's tensors under the names of the layout."""
    files: tuple[PlannedFile, ...]
    dtypes: Mapping[str, str]
    """New element type of every tensor that is cast."""
    config: Mapping[str, Any] | None
    left_out: tuple[str, ...]
    """Patterns of the source's sidecars that do not fit the layout."""
    advice: str


def plan_conversion(model: OpenModel, options: ConvertOptions) -> ConvertPlan:
    """Plan from headers. Raises CheckpointError if a tensor is missing, or has no name in the new layout."""
    own_name, layout = model.layout()
    name, target = in_family(own_name, layout, options.layout)
    model.refuse_unknown_format()
    source = model.source
    assert layout.family is not None and target.family is not None
    family = as_family(source, layout.family.rules, "the checkpoint")
    if options.state:
        family = with_zeros(family, _states(layout, family, name))
    view = as_layout(family, target.family.rules, f"layout {name}")
    code = (
        next(code for code, (_, dtype) in ELEMENTS.items() if dtype == options.dtype)
        if (options.dtype != "auto")
        else None
    )
    dtypes = {
        tensor: code
        for tensor, info in view.infos.items()
        if code and info.dtype in REAL and info.dtype != code
    }
    outputs = [replace(info, dtype=dtypes.get(tensor, info.dtype)) for tensor, info in view.infos.items()]
    if target.family.file is not None:
        refuse_idle_shard_size(options.max_shard_size, f"{target.family.file} is never split")
    files = plan_model(outputs, parse_size(options.max_shard_size), target.family.file)
    moved = layout is not target
    config = target.family.config(family) if target.family.config and moved else None
    return ConvertPlan(
        name=name,
        view=view,
        files=tuple(files),
        dtypes=dtypes,
        config=config,
        left_out=_CODE if moved else (),
        advice=target.family.advice if moved else "",
    )


def _states(layout: Layout, family: RenamedSource, name: str) -> Sequence[TensorInfo]:
    if layout.family is None or layout.family.states is None:
        raise TargetError(f"models of layout {name} have no initial states; leave out --state")
    return layout.family.states(family.infos)


def convert_work(plan: ConvertPlan, origin: str) -> TensorJob:
    """How each tensor is copied or cast."""
    copies = {info.name: file.path for file in plan.files for info in file.infos}
    return TensorJob(
        order=list(copies),
        matrices=plan.dtypes,
        compute=lambda name, tensor: TensorResult(
            {(copies[name], name): cast_finite(name, tensor, torch_dtype(plan.dtypes[name]))}
        ),
        copies=copies,
        origin=origin,
    )


@dataclass(frozen=True)
class ConvertJob:
    """The conversion of one model."""

    model: OpenModel
    plan: ConvertPlan
    options: ConvertOptions
    command: str = "convert"

    @property
    def files(self) -> tuple[PlannedFile, ...]:
        """The files of the converted model."""
        return self.plan.files

    @property
    def inputs(self) -> list[Path]:
        """The model."""
        return [self.model.path]

    def identity(self) -> dict[str, Any]:
        """The model."""
        return {"model": self.model.identity()}

    def write(self, staged: StagedOutput, run: Run) -> None:
        """Rename, repack or cast every tensor."""
        stream(convert_work(self.plan, str(self.model.path)), self.plan.view, staged, run)

    def write_sidecars(self, directory: Path) -> None:
        """Copy the sidecars that fit the layout, and write the layout's configuration."""
        if self.plan.config is not None:
            write_config(directory, self.plan.config)
        complete_checkpoint(
            self.model.sidecars,
            directory,
            self.plan.files,
            exclude=self.plan.left_out,
            was_decoded=self.model.is_decoded,
        )

    def manifest(self, staged: StagedOutput, threads: int) -> Manifest:
        """The manifest of the converted checkpoint, without the number of threads: it changes no bytes."""
        return Manifest(
            kind="converted",
            layout=self.plan.name,
            method="",
            base=self.model.origin(),
            options=asdict(self.options),
            files=file_checksums(staged),
            roles=roles_of(self.files),
        )

    def remarks(self, manifest: Manifest) -> list[str]:
        """What the user has to know to load the new layout."""
        return [self.plan.advice] if self.plan.advice else []
