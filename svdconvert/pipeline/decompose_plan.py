"""What a decomposition will write, planned from headers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from svdconvert.adapters.adapter_config import PER_EXPERT, AdapterConfig
from svdconvert.adapters.peft_files import WEIGHTS, adapter_infos, target_modules
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource, dtype_code
from svdconvert.config.options import SplitOptions
from svdconvert.config.sizes import parse_size
from svdconvert.errors import TargetError
from svdconvert.inputs.model import OpenModel
from svdconvert.layouts.base import LAYOUTS, Layout, Slot
from svdconvert.linalg.solver import Solver
from svdconvert.methods.base import METHODS, Method, init_folder
from svdconvert.output.plan import PlannedFile, plan_file, plan_groups
from svdconvert.output.sidecars import common_float
from svdconvert.pipeline.effects import refuse_idle_options
from svdconvert.pipeline.quantised_plan import (
    decoded_dtype,
    quantised_names,
    rule_of,
    sampled_per_role,
)
from svdconvert.pipeline.quantised_start import Alternation, starts_of
from svdconvert.pipeline.scaling import Scaling, as_pattern, scalings
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
    shards: tuple[PlannedFile, ...]
    adapter: PlannedFile
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
        if not self.without_role:
            return ()
        return (
            f"layout {self.layout} has no role for {', '.join(self.without_role[:8])} "
            f"({len(self.without_role)} such names): these matrices stay as they are",
        )

    @property
    def base_is_residual(self) -> bool:
        """True if another base than the model itself is written, to which the adapter belongs."""
        return self.method.residual or bool(self.quantised)

    @property
    def folder(self) -> str:
        """The folder of the initial adapter."""
        return init_folder(self.options.method)

    @property
    def per_expert(self) -> bool:
        """True if single experts of a mixture are adapted."""
        return any(slot.expert is not None for slot in self.slots.values())

    @property
    def files(self) -> list[PlannedFile]:
        """All files of tensors that are written."""
        return [*self.shards, self.adapter]

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

    def adapter_config(self) -> AdapterConfig:
        """The configuration of the initial adapter."""
        linears = {name.removesuffix(".weight") for name, info in self.infos.items() if len(info.shape) == 2}
        chosen = {slot.name.removesuffix(".weight"): slot.module for slot in self.slots.values()}
        others = linears - set(chosen)
        rank = self.options.rank
        alpha = float(self.options.alpha or self.options.rank)
        ranks = {slot.module: self.scalings[name].rank for name, slot in self.slots.items()}
        alphas = {slot.module: self.scalings[name].alpha for name, slot in self.slots.items()}
        return AdapterConfig(
            rank=rank,
            alpha=alpha,
            targets=target_modules(chosen.values(), [*chosen.values(), *others]),
            peft_type=PER_EXPERT if self.per_expert else self.method.peft_type,
            base_is_residual=self.base_is_residual,
            rslora=self.options.rslora,
            rank_pattern=as_pattern(ranks, rank),
            alpha_pattern=as_pattern(alphas, alpha),
            dropout=self.options.dropout,
            task=LAYOUTS.get(self.layout).task_of(self.infos),
        )


def plan_decomposition(model: OpenModel, options: SplitOptions) -> DecomposePlan:
    """Plan from headers. Raises TargetError if a target cannot be decomposed."""
    layout_name, layout = model.layout(options.layout)
    source = model.source
    method = METHODS.get(options.method).variant(options.init)
    if method.split is None:
        raise TargetError(
            f"{options.method} trains the weights themselves and has nothing to decompose; "
            f"use svdconvert train MODEL --method {options.method}"
        )
    refuse_idle_options(method, options)
    model.refuse_unknown_format()
    slots = layout.select(source.infos, options.targets)
    if options.layout is not None:
        _refuse_partial_layout(layout_name, layout, source)
    scaled = scalings(layout, source.infos, slots, options)
    model.refuse_codes(scaled)
    _refuse_unsuitable(source.infos, scaled)
    rule = rule_of(options)
    quantised = quantised_names(model, layout, slots) if rule else frozenset()
    outputs = [
        stored_infos(info.name, info.shape, rule, decoded_dtype(info))
        if rule and info.name in quantised
        else [_plain_output(options, method, info) if info.name in slots else info]
        for info in source.infos.values()
    ]
    keep = method.residual or options.copy_base or bool(quantised)
    shards = plan_groups(outputs, parse_size(options.max_shard_size)) if keep else []
    dtype = dtype_code(getattr(torch, options.dtype))
    pieces: list[TensorInfo] = []
    for tensor, slot in slots.items():
        rows, columns = source.infos[tensor].shape
        pieces += adapter_infos(slot.module, method.factor_shapes(rows, columns, scaled[tensor].rank), dtype)
    adapter = plan_file(f"{init_folder(options.method)}/{WEIGHTS}", pieces, "initial_adapter")
    without_role = _matrices_without_role(model, layout)
    roles = {name: slot.role for name, slot in slots.items()}
    return DecomposePlan(
        method=method,
        layout=layout_name,
        options=options,
        slots=slots,
        scalings=scaled,
        infos=source.infos,
        shards=tuple(shards),
        adapter=adapter,
        quantised=quantised,
        decoded=frozenset(name for name in slots if is_decoded(source, name)),
        nuclear=sampled_per_role(roles, quantised, options.nuclear_ratio),
        without_role=without_role,
    )


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
    known = {slot.role.rpartition(".")[2] for slot in layout.slots(source.infos).values()}
    if missing := [role for role in layout.roles if role.rpartition(".")[2] not in known]:
        raise TargetError(
            f"layout {name} does not fit the checkpoint: it has no tensor for {', '.join(missing)}; "
            "add a layout for this family, which is one file (see the README)"
        )


def _matrices_without_role(model: OpenModel, layout: Layout) -> tuple[str, ...]:
    """Matrices of the repeated blocks that a layout of other models does not know; "*" for numbers."""
    infos = model.source.infos
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
