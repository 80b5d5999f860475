"""A plain LoRA for the untouched base: scale 1, one rank, no patterns: every engine reads it the same."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot
from typing import Any

import torch
from torch import Tensor

from svdconvert.adapters.extra_parameters import beside_adapters, extra_key
from svdconvert.adapters.peft_files import WEIGHTS, WITH_PARAMETERS, AdapterConfig, key
from svdconvert.adapters.rwkv_peft import FILE, file_key
from svdconvert.checkpoint.rename_rules import RenameRule
from svdconvert.checkpoint.tensors import TensorInfo, dtype_code, tensor_bytes
from svdconvert.config.options import LoraOptions
from svdconvert.config.progress import Progress, Track
from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.layouts.base import LAYOUTS
from svdconvert.linalg.delta import as_lora
from svdconvert.linalg.low_rank import (
    allocate_ranks,
    rank_for_tolerance,
    singular_values,
    truncate,
    truncation_error,
)
from svdconvert.manifest.fingerprint import checksum
from svdconvert.output.plan import PlannedFile, plan_file
from svdconvert.output.staging import StagedOutput

_SIDES = ("lora_A", "lora_B")
_RWKV = re.compile(r"blocks\.\d+\.(att|ffn)\.\w+")


@dataclass(frozen=True)
class Truncation:
    """What is kept of the changes, and how much is lost."""

    ranks: Mapping[str, int]
    """By module."""
    errors: Mapping[str, float]
    """||change - kept||_F / ||change||_F by module, exact."""
    error: float
    """The same over all modules together."""

    def note(self) -> dict[str, Any]:
        """For the manifest."""
        modules = {
            module: {"rank": rank, "error": self.errors[module]} for module, rank in self.ranks.items()
        }
        return {"error": self.error, "modules": modules}


@dataclass(frozen=True)
class Keys:
    """What the tensors are called in the file."""

    pieces: Mapping[tuple[str, str], str]
    """(module, piece) -> name."""
    extras: Mapping[str, str]
    """Parameter -> name."""


@dataclass(frozen=True)
class LoraPlan:
    """What will be written."""

    change: AdapterDelta
    rank: int
    """The largest of the modules; the others are padded with zeros."""
    dtype: torch.dtype
    file: PlannedFile
    keys: "Keys"
    truncation: Truncation | None = None
    """None where the LoRA is exact."""


def plan_lora(change: AdapterDelta, options: LoraOptions) -> LoraPlan:
    """Find the ranks by a first pass over the small factors, and plan the file."""
    dtype: torch.dtype = getattr(torch, options.dtype)
    truncation = _truncation(change, options)
    if truncation is None:
        rank = max(_exact(change, module)[0].shape[1] for module in change.modules)
    else:
        rank = max(1, *truncation.ranks.values())
    keys = _rwkv_peft_keys(change) if options.format == "rwkv-peft" else _peft_keys(change)
    infos = []
    for (module, piece), name in keys.pieces.items():
        rows, columns = change.after.shape(module, "lora_B")[0], change.after.shape(module, "lora_A")[1]
        shape = (rank, columns) if piece == "lora_A" else (rows, rank)
        infos.append(TensorInfo(name, shape, dtype_code(dtype)))
    infos += [
        TensorInfo(name, change.after.source.infos[change.after.extras[parameter]].shape, dtype_code(dtype))
        for parameter, name in keys.extras.items()
    ]
    file = PlannedFile(FILE, tuple(infos)) if options.format == "rwkv-peft" else plan_file(WEIGHTS, infos)
    return LoraPlan(change, rank, dtype, file, keys, truncation)


def _peft_keys(change: AdapterDelta) -> Keys:
    pieces = {(module, piece): key(module, piece) for module in change.modules for piece in _SIDES}
    adapted = change.modules
    return Keys(pieces, {parameter: extra_key(parameter, adapted) for parameter in change.after.extras})


def _rwkv_peft_keys(change: AdapterDelta) -> Keys:
    """The names of a .pth. Raises ArtifactError for what has none there."""
    known = change.manifest
    layout = LAYOUTS.get(known.layout) if known and known.layout else None
    paths = {matrix.module: name for name, matrix in known.matrices.items()} if known else {}
    names = {
        module: layout.network_path(paths[module]) if layout and module in paths else module
        for module in change.modules
    }
    if odd := [name for name in names.values() if not _RWKV.fullmatch(name)]:
        raise ArtifactError(
            f"{change.directory} adapts {odd[0]}, and the format rwkv-peft is for RWKV-6 alone"
        )
    extras = {}
    for parameter in change.after.extras:
        rule = layout.rename_rule(parameter) if layout and paths else RenameRule((parameter,), parameter)
        if rule.to_layout is not None:
            raise ArtifactError(
                f"{change.directory} trained {parameter}, which is no single tensor in the format rwkv-peft; "
                "merge it, or train the model in the layout blinkdl"
            )
        extras[parameter] = rule.canonical[0]
    pieces = {(module, piece): file_key(names[module], piece) for module in names for piece in _SIDES}
    return Keys(pieces, extras)


def _truncation(change: AdapterDelta, options: LoraOptions) -> Truncation | None:
    """The ranks that the options ask for: one module's factors in memory at a time."""
    if options.rank is options.tol is options.rank_budget is None:
        return None
    sigmas = {
        module: singular_values(*(side.double() for side in _exact(change, module)))
        for module in change.modules
    }
    if options.rank_budget is not None:
        ranks = allocate_ranks(sigmas, options.rank_budget)
    elif options.tol is not None:
        ranks = {module: rank_for_tolerance(sigma, options.tol) for module, sigma in sigmas.items()}
    else:
        ranks = {module: min(options.rank or 1, len(sigma)) for module, sigma in sigmas.items()}
    lost = {module: truncation_error(sigma, ranks[module]) for module, sigma in sigmas.items()}
    whole = {module: truncation_error(sigma, 0) for module, sigma in sigmas.items()}
    errors = {module: lost[module] / whole[module] if whole[module] else 0.0 for module in sigmas}
    all_of_it = hypot(*whole.values())
    return Truncation(ranks, errors, hypot(*lost.values()) / all_of_it if all_of_it else 0.0)


def lora_config(plan: LoraPlan, base: str | None) -> AdapterConfig:
    """Scale 1 (alpha is the rank), no rslora, no patterns; `base` is a Hub id."""
    own = plan.change.after.config
    return AdapterConfig(
        rank=plan.rank,
        alpha=plan.rank,
        targets=own.targets,
        base=base,
        task=own.task,
        modules_to_save=own.modules_to_save,
        bias=own.bias,
        peft_type=WITH_PARAMETERS
        if beside_adapters(plan.change.after.extras, plan.change.modules)
        else "LORA",
    )


def write_lora(plan: LoraPlan, staged: StagedOutput, track: Track) -> None:
    """Write every module's factors. Notes go into the journal of `staged`."""
    for done, module in enumerate(plan.change.modules, 1):
        if module not in staged.finished:
            staged.finish(module, _write_module(plan, module, staged))
        track(Progress(module, plan.file.path, done, len(plan.change.modules)))
    for parameter, name in plan.keys.extras.items():
        if name not in staged.finished:
            whole = plan.change.extra(parameter).to(plan.dtype)
            staged.write(plan.file.path, name, whole)
            staged.finish(name, {"files": {plan.file.path: {name: checksum(tensor_bytes(whole))}}})


def _write_module(plan: LoraPlan, module: str, staged: StagedOutput) -> dict[str, Any]:
    left, right = _exact(plan.change, module)
    if plan.truncation is not None:
        left, right = truncate(left, right, plan.truncation.ranks[module])
    missing = plan.rank - left.shape[1]
    pieces = {
        plan.keys.pieces[module, "lora_A"]: torch.nn.functional.pad(right, (0, 0, 0, missing)).to(plan.dtype),
        plan.keys.pieces[module, "lora_B"]: torch.nn.functional.pad(left, (0, missing)).to(plan.dtype),
    }
    for name, piece in pieces.items():
        staged.write(plan.file.path, name, piece)
    marks = {name: checksum(tensor_bytes(piece)) for name, piece in pieces.items()}
    return {"files": {plan.file.path: marks}}


def _exact(change: AdapterDelta, module: str) -> tuple[Tensor, Tensor]:
    (after, scale), (before, scale0) = change.end(module), change.start(module)
    return as_lora(after, scale, before, scale0)
