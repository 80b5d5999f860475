"""A checkpoint under the names of another layout: planned from headers, then copied tensor by tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from svdconvert.checkpoint.renamed import RenamedSource, as_family, as_layout, with_zeros
from svdconvert.checkpoint.tensors import ELEMENTS, REAL, TensorInfo, TensorSource, torch_dtype
from svdconvert.config.options import ConvertOptions
from svdconvert.config.sizes import parse_size
from svdconvert.errors import TargetError
from svdconvert.layouts.base import Layout
from svdconvert.output.plan import PlannedFile, plan_model
from svdconvert.pipeline.runner import TensorJob, TensorResult

_CODE = ("config.json", "configuration_*.py", "modeling_*.py")
"""What belongs to the names, and is another's in another layout."""


@dataclass(frozen=True)
class Conversion:
    """What will be written, known from headers alone."""

    name: str
    """Of the layout."""
    view: RenamedSource
    """The source as the layout has it."""
    files: tuple[PlannedFile, ...]
    dtypes: Mapping[str, str]
    """Element type of every tensor that gets another one."""
    config: Mapping[str, Any] | None
    left_out: tuple[str, ...]
    """Patterns of files beside the source that do not fit the layout."""
    advice: str


def plan_conversion(
    source: TensorSource, layout: Layout, name: str, target: Layout, options: ConvertOptions
) -> Conversion:
    """Plan from headers. Raises CheckpointError where a tensor is missing, unknown or has no place."""
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
    files = plan_model(outputs, parse_size(options.max_shard_size), target.family.file)
    moved = layout is not target
    config = target.family.config(family) if target.family.config and moved else None
    return Conversion(
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
        raise TargetError(f"models of layout {name} have no state to be tuned; leave --state out")
    return layout.family.states(family.infos)


def convert_work(plan: Conversion, origin: str) -> TensorJob:
    """How each tensor is copied, or cast."""
    copies = {info.name: file.path for file in plan.files for info in file.infos}
    return TensorJob(
        order=list(copies),
        matrices=plan.dtypes,
        compute=lambda name, tensor: TensorResult(
            {(copies[name], name): _cast(name, tensor, plan.dtypes[name])}
        ),
        copies=copies,
        origin=origin,
    )


def _cast(name: str, tensor: Tensor, code: str) -> Tensor:
    """`tensor` in another element type. Raises TargetError where a value does not fit in."""
    cast = tensor.to(torch_dtype(code))
    if tensor.isfinite().all() and not cast.isfinite().all():
        raise TargetError(
            f"{name} holds values up to {float(tensor.abs().max()):.3g}, too large for {ELEMENTS[code][1]}; "
            "convert to another --dtype"
        )
    return cast
