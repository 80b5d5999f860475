"""to-lora: which factors will be written, with which ranks and names."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import hypot
from typing import Protocol

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import TensorInfo, dtype_code
from svdconvert.config.options import LoraOptions
from svdconvert.errors import ArtifactError, RecipeError
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.model import OpenModel
from svdconvert.inputs.sources import Sources
from svdconvert.linalg.delta import as_lora
from svdconvert.linalg.low_rank import allocate_ranks, rank_for_tolerance, singular_values, truncation_error
from svdconvert.manifest.results import TruncatedLora, TruncatedModule
from svdconvert.output.plan import PlannedFile
from svdconvert.pipeline.lora_experts import LoraForm, plan_form
from svdconvert.pipeline.lora_formats import Keys, LoraFormat, lora_format


class RankOptions(Protocol):
    """Options of which one decides the ranks of a LoRA."""

    @property
    def rank(self) -> int | None:
        """The rank of every matrix."""
        ...

    @property
    def tol(self) -> float | None:
        """The largest share of each change's norm that may be lost."""
        ...

    @property
    def rank_budget(self) -> int | None:
        """The sum of all ranks."""
        ...


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
class LoraPlan:
    """What will be written."""

    delta: AdapterDelta
    options: LoraOptions
    rank: int
    """The largest rank of a module that is in no stack; smaller factors are padded with zeros."""
    dtype: torch.dtype
    format: LoraFormat
    file: PlannedFile
    keys: Keys
    form: LoraForm
    truncation: Truncation | None = None
    """None if the LoRA is exact."""


def plan_lora(
    delta: AdapterDelta, options: LoraOptions, sources: Sources, model: OpenModel | None = None
) -> LoraPlan:
    """Determine the ranks in a first pass over the factors, and plan the file.

    `sources` has the location of the untouched base, if it was given, and `model` is the open base, which
    only the format gguf needs. Raises ArtifactError if the names of experts are needed and not known, or if
    the format cannot express what the adapter holds.
    """
    if options.base_name is not None and options.format not in ("peft", "vllm"):
        raise RecipeError(
            f"`base_name` changes nothing here: the format {options.format} names no base; leave it out"
        )
    dtype: torch.dtype = getattr(torch, options.dtype)
    truncation = _truncation(delta, options)
    if truncation is None:
        ranks = {module: exact_factors(delta, module)[0].shape[1] for module in delta.modules}
    else:
        ranks = {module: max(1, rank) for module, rank in truncation.ranks.items()}
    form = replace(plan_form(delta, options, ranks, sources), base_name=options.base_name)
    rank = max(ranks[module] for module in form.pieces or ranks)
    format_ = lora_format(options.format, delta, model)
    keys = format_.keys(delta, form)
    infos = []
    for (module, piece), name in keys.pieces.items():
        rows = keys.rows.get(module)
        count = delta.adapter.shape(keys.owner(module), "lora_B")[0] if rows is None else rows.size
        columns = delta.adapter.shape(keys.owner(module), "lora_A")[1]
        shape = (rank, columns) if piece == "lora_A" else (count, rank)
        shape = shape[::-1] if keys.owner(module) in delta.adapter.embeddings else shape
        infos.append(TensorInfo(name, format_.stored_shape(shape), dtype_code(dtype)))
    infos += [info for stack in form.stacks for info in stack.infos(dtype_code(dtype))]
    infos += [
        TensorInfo(name, delta.adapter.parameter_info(parameter).shape, dtype_code(dtype))
        for parameter, name in keys.extras.items()
    ]
    file = format_.file(infos, rank)
    return LoraPlan(delta, options, rank, dtype, format_, file, keys, form, truncation)


def _truncation(delta: AdapterDelta, options: LoraOptions) -> Truncation | None:
    if delta.approximation is not None:
        ranks = {module: delta.adapter.shape(module, "lora_A")[0] for module in delta.modules}
        lost = {module: delta.approximation(module) for module in delta.modules}
        errors = {module: rest / norm if norm else 0.0 for module, (rest, norm) in lost.items()}
        total = hypot(*(norm for _, norm in lost.values()))
        rest = hypot(*(rest for rest, _ in lost.values()))
        return Truncation(ranks, errors, rest / total if total else 0.0)
    return choose_ranks(delta.modules, lambda module: exact_factors(delta, module), options)


def refuse_idle_ranks(ranks: Collection[int], options: RankOptions) -> None:
    """Raise RecipeError for a rank, or a sum of ranks, above those of the exact result."""
    for name, given, exact in (
        ("--rank", options.rank, max(ranks, default=0)),
        ("--rank-budget", options.rank_budget, sum(ranks)),
    ):
        if given is not None and given > exact:
            what = "the highest rank is" if name == "--rank" else "all ranks together are"
            raise RecipeError(
                f"{name} {given} changes nothing: {what} {exact} without it; give less, or leave it out"
            )


def choose_ranks(
    modules: Iterable[str], factors: Callable[[str], tuple[Tensor, Tensor]], options: RankOptions
) -> Truncation | None:
    """The ranks that follow from the options; one module's factors are in memory at a time.

    Raises RecipeError if the options leave every rank as it is.
    """
    if options.rank is options.tol is options.rank_budget is None:
        return None
    sigmas = {module: singular_values(*(side.double() for side in factors(module))) for module in modules}
    refuse_idle_ranks([len(sigma) for sigma in sigmas.values()], options)
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
