"""to-lora: which factors will be written, with which ranks and names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import hypot

import torch
from torch import Tensor

from svdconvert.adapters.embedding_factors import embedding_key
from svdconvert.adapters.extra_parameters import copy_key, extra_key
from svdconvert.adapters.peft_files import WEIGHTS, key
from svdconvert.adapters.rwkv_peft import FILE, file_key
from svdconvert.checkpoint.rename_rules import RenameRule
from svdconvert.checkpoint.tensors import TensorInfo, dtype_code
from svdconvert.config.options import LoraOptions
from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.layouts.base import LAYOUTS
from svdconvert.linalg.delta import as_lora
from svdconvert.linalg.low_rank import allocate_ranks, rank_for_tolerance, singular_values, truncation_error
from svdconvert.manifest.place import Rows
from svdconvert.manifest.results import TruncatedLora, TruncatedModule
from svdconvert.output.plan import PlannedFile, plan_file
from svdconvert.pipeline.lora_experts import LoraForm, plan_form

_SIDES = ("lora_A", "lora_B")
_RWKV = re.compile(r"blocks\.\d+\.(att|ffn)\.\w+")


@dataclass(frozen=True)
class Truncation:
    """The ranks of a truncated LoRA, and the errors of the truncation."""

    ranks: Mapping[str, int]
    """The rank of each module."""
    errors: Mapping[str, float]
    """||change - kept||_F / ||change||_F by module, exact."""
    error: float
    """The same over all modules together."""

    def result(self) -> TruncatedLora:
        """For the manifest."""
        modules = {
            module: TruncatedModule(rank=rank, error=self.errors[module])
            for module, rank in self.ranks.items()
        }
        return TruncatedLora(error=self.error, modules=modules)


@dataclass(frozen=True)
class Keys:
    """The names of the tensors in the file."""

    pieces: Mapping[tuple[str, str], str]
    """(module in the LoRA, piece) -> name."""
    extras: Mapping[str, str]
    """Parameter -> name."""
    rows: Mapping[str, Rows] = field(default_factory=dict)
    """Module in the LoRA -> rows of B, if these are not all of them."""
    owners: Mapping[str, str] = field(default_factory=dict)
    """Module in the LoRA -> module of the adapter, if their names differ."""

    def owner(self, module: str) -> str:
        """The module of the adapter whose factors are written as `module`."""
        return self.owners.get(module, module)


@dataclass(frozen=True)
class LoraPlan:
    """What will be written."""

    delta: AdapterDelta
    options: LoraOptions
    rank: int
    """The largest rank of a module that is in no stack; smaller factors are padded with zeros."""
    dtype: torch.dtype
    file: PlannedFile
    keys: Keys
    form: LoraForm
    truncation: Truncation | None = None
    """None if the LoRA is exact."""


def plan_lora(delta: AdapterDelta, options: LoraOptions, base: str | None = None) -> LoraPlan:
    """Determine the ranks in a first pass over the factors, and plan the file.

    `base` is the location of the untouched base, if it was given. Raises ArtifactError if the names of
    experts are needed and not known.
    """
    dtype: torch.dtype = getattr(torch, options.dtype)
    truncation = _truncation(delta, options)
    if truncation is None:
        ranks = {module: exact_factors(delta, module)[0].shape[1] for module in delta.modules}
    else:
        ranks = {module: max(1, rank) for module, rank in truncation.ranks.items()}
    form = plan_form(delta, options, ranks, base)
    rank = max(ranks[module] for module in form.pieces or ranks)
    keys = _rwkv_peft_keys(delta) if options.format == "rwkv-peft" else _peft_keys(delta, form)
    infos = []
    for (module, piece), name in keys.pieces.items():
        rows = keys.rows.get(module)
        count = delta.adapter.shape(keys.owner(module), "lora_B")[0] if rows is None else rows.size
        columns = delta.adapter.shape(keys.owner(module), "lora_A")[1]
        shape = (rank, columns) if piece == "lora_A" else (count, rank)
        shape = shape[::-1] if keys.owner(module) in delta.adapter.embeddings else shape
        infos.append(TensorInfo(name, shape, dtype_code(dtype)))
    infos += [info for stack in form.stacks for info in stack.infos(dtype_code(dtype))]
    infos += [
        TensorInfo(name, delta.adapter.parameter_info(parameter).shape, dtype_code(dtype))
        for parameter, name in keys.extras.items()
    ]
    if options.format == "rwkv-peft":
        file = PlannedFile(FILE, tuple(infos), "adapter")
    else:
        file = plan_file(WEIGHTS, infos, "adapter")
    return LoraPlan(delta, options, rank, dtype, file, keys, form, truncation)


def _peft_keys(delta: AdapterDelta, form: LoraForm) -> Keys:
    written = {name: rows for parts in form.pieces.values() for name, rows in parts}
    embeddings = delta.adapter.embeddings
    pieces = {
        (name, piece): embedding_key(name, piece) if name in embeddings else key(name, piece)
        for name in written
        for piece in _SIDES
    }
    adapted = delta.modules
    extras = {parameter: extra_key(parameter, adapted) for parameter in delta.adapter.extras}
    if delta.initial_adapter is None:
        extras |= {parameter: copy_key(parameter) for parameter in delta.adapter.copies}
    owners = {name: module for module, parts in form.pieces.items() for name, _ in parts}
    return Keys(pieces, extras, {name: rows for name, rows in written.items() if rows}, owners)


def _rwkv_peft_keys(delta: AdapterDelta) -> Keys:
    """The names in RWKV-PEFT's format. Raises ArtifactError if a module or parameter has none there."""
    known = delta.manifest
    layout = LAYOUTS.get(known.layout) if known and known.layout in LAYOUTS.names() else None
    paths = {matrix.module: name for name, matrix in known.matrices.items()} if known else {}
    names = {
        module: layout.network_path(paths[module]) if layout and module in paths else module
        for module in delta.modules
    }
    if odd := [name for name in names.values() if not _RWKV.fullmatch(name)]:
        raise ArtifactError(
            f"{delta.directory} adapts {odd[0]}, but the format rwkv-peft is for RWKV-6 only; "
            "use --format peft"
        )
    extras = {}
    for parameter in delta.adapter.extras:
        rule = layout.rename_rule(parameter) if layout and paths else RenameRule((parameter,), parameter)
        if rule.to_layout is not None:
            raise ArtifactError(
                f"{delta.directory} trained {parameter}, which is no single tensor in the format rwkv-peft; "
                "merge it, or train the model in the layout blinkdl"
            )
        extras[parameter] = rule.canonical[0]
    pieces = {(module, piece): file_key(names[module], piece) for module in names for piece in _SIDES}
    return Keys(pieces, extras)


def _truncation(delta: AdapterDelta, options: LoraOptions) -> Truncation | None:
    """The ranks that follow from the options; one module's factors are in memory at a time."""
    if options.rank is options.tol is options.rank_budget is None:
        return None
    sigmas = {
        module: singular_values(*(side.double() for side in exact_factors(delta, module)))
        for module in delta.modules
    }
    if options.rank_budget is not None:
        ranks = allocate_ranks(sigmas, options.rank_budget)
    elif options.tol is not None:
        ranks = {module: rank_for_tolerance(sigma, options.tol) for module, sigma in sigmas.items()}
    else:
        ranks = {module: min(options.rank or 1, len(sigma)) for module, sigma in sigmas.items()}
    lost = {module: truncation_error(sigma, ranks[module]) for module, sigma in sigmas.items()}
    norms = {module: truncation_error(sigma, 0) for module, sigma in sigmas.items()}
    errors = {module: lost[module] / norms[module] if norms[module] else 0.0 for module in sigmas}
    total = hypot(*norms.values())
    return Truncation(ranks, errors, hypot(*lost.values()) / total if total else 0.0)


def exact_factors(delta: AdapterDelta, module: str) -> tuple[Tensor, Tensor]:
    """(B, A) of a module's delta, without truncation."""
    factors, scale = delta.trained(module)
    initial, initial_scale = delta.initial(module)
    left, right = as_lora(factors, scale, initial, initial_scale)
    if not (left.isfinite().all() and right.isfinite().all()):
        raise ArtifactError(
            f"{delta.directory}: the scaled factors of {module} are NaN or Inf; check lora_alpha ({scale:g} "
            "is the scale)"
        )
    return left, right
