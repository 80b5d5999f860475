"""What a decomposition will write, planned from headers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from svdconvert.checkpoint.tensors import TensorInfo, TensorSource, dtype_code
from svdconvert.config.options import SplitOptions
from svdconvert.config.sizes import parse_size
from svdconvert.errors import TargetError
from svdconvert.inputs.model import OpenModel
from svdconvert.layouts.base import Layout, Slot
from svdconvert.linalg.solver import Solver
from svdconvert.methods.base import METHODS, Method, init_folder
from svdconvert.output.plan import PlannedFile, plan_divided
from svdconvert.output.sidecars import common_float
from svdconvert.pipeline.adapter_plan import AdapterPlan, plan_adapter
from svdconvert.pipeline.adapter_targets import Chosen
from svdconvert.pipeline.effects import refuse_idle_experts, refuse_idle_options
from svdconvert.pipeline.quantised_plan import (
    decoded_dtype,
    quantised_names,
    rule_of,
    sampled_per_role,
)
from svdconvert.pipeline.quantised_start import Alternation, starts_of
from svdconvert.pipeline.scaling import Scaling, scalings
from svdconvert.quantization.nf4 import stored_infos
from svdconvert.quantization.view import is_decoded

_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class DecomposePlan:
    """What will be written, planned from headers alone."""

    method: Method
    layout: str
    options: SplitOptions
    slots: Mapping[str, Slot]
    scalings: Mapping[str, Scaling]
    """Rank and scale, by tensor."""
    infos: Mapping[str, TensorInfo]
    """The tensors of the model; stacked experts are divided."""
    shards: tuple[PlannedFile, ...]
    adapter: AdapterPlan
    layout_in_use: Layout
    """The layout with the name `layout`."""
    quantised: frozenset[str] = frozenset()
    """The matrices whose residuals are stored in 4 bits."""
    decoded: frozenset[str] = frozenset()
    """The matrices that the source stores as codes, which are read in float32."""
    nuclear: frozenset[str] = frozenset()
    """Those of them whose nuclear norms are measured."""
    without_role: tuple[str, ...] = ()
    """Matrices of the repeated blocks that the layout does not know and that stay as they are."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know of the plan."""
        remarks = self.layout_in_use.remarks()
        narrow = [name for name in self.slots if self._is_narrow(name)]
        if narrow:
            remarks += (
                f"{len(narrow)} matrices, such as {narrow[0]} {self.infos[narrow[0]].shape}, are narrower "
                f"than rank {self.options.rank} and have the highest rank that they can have",
            )
        if not self.without_role:
            return remarks
        return (
            *remarks,
            f"layout {self.layout} has no role for {', '.join(self.without_role[:8])} "
            f"({len(self.without_role)} such names): these matrices stay as they are",
        )

    def _is_narrow(self, name: str) -> bool:
        return self.scalings[name].rank == min(self.infos[name].shape) < self.options.rank

    @property
    def base_is_residual(self) -> bool:
        """True if another base than the model itself is written, to which the adapter belongs."""
        return self.method.residual or bool(self.quantised)

    @property
    def folder(self) -> str:
        """The folder of the initial adapter."""
        return init_folder(self.options.method)

    @property
    def files(self) -> list[PlannedFile]:
        """All files of tensors that are written and stay."""
        return [*self.shards, self.adapter.file]

    @property
    def stored_dtypes(self) -> list[str]:
        """The element types of all weights of the model that is written, those in 4 bits as decoded."""
        kept = [info.dtype for name, info in self.infos.items() if name not in self.quantised]
        return kept + [dtype_code(decoded_dtype(self.infos[name])) for name in self.quantised]

    @property
    def read_dtype(self) -> torch.dtype:
        """What every command decodes 4-bit matrices to: the dtype that config.json will name."""
        name = common_float(set(self.stored_dtypes))
        return getattr(torch, name) if name in ("float32", "float16") else torch.bfloat16

    def alternation(self, name: str, solver: Solver) -> Alternation:
        """How the residual of the matrix `name` is quantised."""
        rule = rule_of(self.options)
        assert rule is not None
        return Alternation(
            method=self.method,
            rank=self.scalings[name].rank,
            scale=self.scalings[name].scale,
            solver=solver,
            dtype=getattr(torch, self.options.dtype),
            rule=rule,
            starts=starts_of(self.method, self.options.quant_start),
            iterations=self.options.quant_iterations,
            read_dtype=self.read_dtype,
            nuclear=name in self.nuclear,
        )

    def residual_dtype(self, name: str) -> str:
        """The element type of the residual of the tensor `name`."""
        return _residual_code(self.options, self.method, self.infos[name])


def plan_decomposition(model: OpenModel, options: SplitOptions) -> DecomposePlan:
    """Plan from headers. Raises TargetError if a target cannot be decomposed."""
    layout_name, layout = model.layout(options.layout)
    method = METHODS.get(options.method).variant(options.init)
    if method.split is None:
        raise TargetError(
            f"{options.method} trains the weights themselves and has nothing to decompose; "
            f"use svdconvert train MODEL --method {options.method}"
        )
    refuse_idle_options(method, options)
    model.refuse_unknown_format()
    source = layout.divided(model.source)
    slots = layout.select(source.infos, options.targets)
    refuse_idle_experts(options.experts, any(slot.expert is not None for slot in slots.values()))
    if options.layout is not None:
        _refuse_partial_layout(layout_name, layout, source)
    scaled = scalings(layout, source.infos, slots, options)
    model.refuse_codes(source.infos, scaled)
    _refuse_unsuitable(source.infos, scaled)
    quantised = quantised_names(model, layout, slots) if rule_of(options) else frozenset()
    roles = {name: slot.role for name, slot in slots.items()}
    adapter = plan_adapter(Chosen(layout, source.infos, slots, scaled, method, options))
    if quantised:  # another base than the model, also if the factors start at zero
        adapter = replace(adapter, config=replace(adapter.config, base_is_residual=True))
    return DecomposePlan(
        method=method,
        layout=layout_name,
        options=options,
        slots=slots,
        scalings=scaled,
        infos=source.infos,
        shards=_plan_shards(model, source, method, options, (slots, quantised)),
        adapter=adapter,
        layout_in_use=layout,
        quantised=quantised,
        decoded=frozenset(name for name in slots if is_decoded(source, name)),
        nuclear=sampled_per_role(roles, quantised, options.nuclear_ratio),
        without_role=_matrices_without_role(model, layout, source.infos),
    )


def _plan_shards(
    model: OpenModel,
    source: TensorSource,
    method: Method,
    options: SplitOptions,
    chosen: tuple[Mapping[str, Slot], frozenset[str]],
) -> tuple[PlannedFile, ...]:
    """The files of the base that is written; `chosen` are the target matrices, and those stored in 4 bits."""
    slots, quantised = chosen
    if not (method.residual or options.copy_base or quantised):
        return ()
    rule = rule_of(options)

    def stored_as(info: TensorInfo) -> Sequence[TensorInfo]:
        if rule and info.name in quantised:
            return stored_infos(info.name, info.shape, rule, decoded_dtype(source.infos[info.name]))
        return (info,)

    outputs = [
        _plain_output(options, method, info) if info.name in slots and info.name not in quantised else info
        for info in source.infos.values()
    ]
    limit = parse_size(options.max_shard_size)
    return tuple(plan_divided(outputs, model.source.infos, limit, stored_as))


def _plain_output(options: SplitOptions, method: Method, info: TensorInfo) -> TensorInfo:
    return replace(info, dtype=_residual_code(options, method, info)) if method.residual else info


def _residual_code(options: SplitOptions, method: Method, info: TensorInfo) -> str:
    if options.residual_dtype != "auto":
        return dtype_code(getattr(torch, options.residual_dtype))
    if method.residual_dtype is not None:
        return dtype_code(getattr(torch, method.residual_dtype))
    return info.dtype


def _refuse_partial_layout(name: str, layout: Layout, source: TensorSource) -> None:
    """Refuse a given layout of whose roles the checkpoint lacks one.

    In a mixture of experts either an expert's matrix or that of a dense layer is enough.
    """
    known = {
        part
        for slot in layout.slots(source.infos).values()
        for part in slot.role.rpartition(".")[2].split("_")
    }
    if missing := [role for role in layout.roles if not known.issuperset(role.rpartition(".")[2].split("_"))]:
        raise TargetError(
            f"layout {name} does not fit the checkpoint: it has no tensor for {', '.join(missing)}; "
            "add a layout for this family, which is one file (see the README)"
        )


def _matrices_without_role(
    model: OpenModel, layout: Layout, infos: Mapping[str, TensorInfo]
) -> tuple[str, ...]:
    """Matrices of the repeated blocks that a layout of other models does not know; "*" for numbers."""
    if model.config.get("model_type") in layout.model_types or layout.signature_tensor in infos:
        return ()
    slots = layout.slots(infos)
    blocks = {name.partition(f".{slot.layer}.")[0] for name, slot in slots.items()}
    left = [
        info.name
        for info in infos.values()
        if len(info.shape) == 2 and info.name not in slots and _NUMBER.split(info.name)[0] in blocks
    ]
    return tuple(dict.fromkeys(_NUMBER.sub(".*.", name) for name in left))


def _refuse_unsuitable(infos: Mapping[str, TensorInfo], scaled: Mapping[str, Scaling]) -> None:
    chosen = [infos[name] for name in scaled]
    if shapeless := [info for info in chosen if len(info.shape) != 2 or 0 in info.shape]:
        raise TargetError(
            f"{shapeless[0].name} has the shape {shapeless[0].shape} and is not a matrix; "
            "choose other targets"
        )
    if small := [info for info in chosen if min(info.shape) < scaled[info.name].rank]:
        rank = max(scaled[info.name].rank for info in small)
        shapes = ", ".join(f"{info.name} {info.shape}" for info in small[:3])
        most = min(min(info.shape) for info in small)
        raise TargetError(
            f"rank {rank} is above what {len(small)} of {len(chosen)} targets have: {shapes}; "
            f"give --rank {most} or less, or other --targets"
        )
