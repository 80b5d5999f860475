"""A plain LoRA for the untouched base: scale 1, one rank, no patterns: every engine reads it the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot
from typing import Any

import torch
from torch import Tensor

from svdconvert.adapters.delta import as_lora
from svdconvert.adapters.peft_format import WEIGHTS, AdapterConfig, adapter_infos, key
from svdconvert.artifact.change import Change
from svdconvert.artifact.fingerprint import checksum
from svdconvert.artifact.options import LoraOptions
from svdconvert.checkpoint.shards import PlannedFile, plan_file
from svdconvert.checkpoint.source import TensorInfo, dtype_code, tensor_bytes
from svdconvert.checkpoint.writer import StagedOutput
from svdconvert.linalg.core import left_out, rank_within, share_out, singular_values, truncated
from svdconvert.progress import Progress, Track


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
class LoraPlan:
    """What will be written."""

    change: Change
    rank: int
    """The largest of the modules; the others are padded with zeros."""
    dtype: torch.dtype
    file: PlannedFile
    truncation: Truncation | None = None
    """None where the LoRA is exact."""


def plan_lora(change: Change, options: LoraOptions) -> LoraPlan:
    """Find the ranks by a first pass over the small factors, and plan the file."""
    dtype: torch.dtype = getattr(torch, options.dtype)
    truncation = _truncation(change, options)
    if truncation is None:
        rank = max(_exact(change, module)[0].shape[1] for module in change.modules)
    else:
        rank = max(1, *truncation.ranks.values())
    infos = []
    for module in change.modules:
        rows, columns = change.after.shape(module, "lora_B")[0], change.after.shape(module, "lora_A")[1]
        infos += adapter_infos(module, {"lora_A": (rank, columns), "lora_B": (rows, rank)}, dtype_code(dtype))
    infos += [
        TensorInfo(name, change.after.source.infos[name].shape, dtype_code(dtype))
        for name in change.after.extras.values()
    ]
    return LoraPlan(change, rank, dtype, plan_file(WEIGHTS, infos), truncation)


def _truncation(change: Change, options: LoraOptions) -> Truncation | None:
    """The ranks that the options ask for: one module's factors in memory at a time."""
    if options.rank is options.tol is options.rank_budget is None:
        return None
    sigmas = {
        module: singular_values(*(side.double() for side in _exact(change, module)))
        for module in change.modules
    }
    if options.rank_budget is not None:
        ranks = share_out(sigmas, options.rank_budget)
    elif options.tol is not None:
        ranks = {module: rank_within(sigma, options.tol) for module, sigma in sigmas.items()}
    else:
        ranks = {module: min(options.rank or 1, len(sigma)) for module, sigma in sigmas.items()}
    lost = {module: left_out(sigma, ranks[module]) for module, sigma in sigmas.items()}
    whole = {module: left_out(sigma, 0) for module, sigma in sigmas.items()}
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
        modules_to_save=own.modules_to_save,
        bias=own.bias,
    )


def write_lora(plan: LoraPlan, staged: StagedOutput, track: Track) -> None:
    """Write every module's factors. Notes go into the journal of `staged`."""
    for done, module in enumerate(plan.change.modules, 1):
        if module not in staged.finished:
            staged.finish(module, _write_module(plan, module, staged))
        track(Progress(module, plan.file.path, done, len(plan.change.modules)))
    for parameter, name in plan.change.after.extras.items():
        if name not in staged.finished:
            whole = plan.change.extra(parameter).to(plan.dtype)
            staged.write(plan.file.path, name, whole)
            staged.finish(name, {"files": {plan.file.path: {name: checksum(tensor_bytes(whole))}}})


def _write_module(plan: LoraPlan, module: str, staged: StagedOutput) -> dict[str, Any]:
    left, right = _exact(plan.change, module)
    if plan.truncation is not None:
        left, right = truncated(left, right, plan.truncation.ranks[module])
    missing = plan.rank - left.shape[1]
    pieces = {
        key(module, "lora_A"): torch.nn.functional.pad(right, (0, 0, 0, missing)).to(plan.dtype),
        key(module, "lora_B"): torch.nn.functional.pad(left, (0, missing)).to(plan.dtype),
    }
    for name, piece in pieces.items():
        staged.write(plan.file.path, name, piece)
    marks = {name: checksum(tensor_bytes(piece)) for name, piece in pieces.items()}
    return {"files": {plan.file.path: marks}}


def _exact(change: Change, module: str) -> tuple[Tensor, Tensor]:
    (after, scale), (before, scale0) = change.end(module), change.start(module)
    return as_lora(after, scale, before, scale0)
