"""combine: several adapters are merged into one LoRA, in the joint rank space of their factors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import hypot
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from svdconvert.adapters.adapter_config import CONFIG, PER_EXPERT, WITH_PARAMETERS, AdapterConfig
from svdconvert.adapters.extra_parameters import contains_adapters, declaration, extra_key
from svdconvert.adapters.peft_files import WEIGHTS, key
from svdconvert.adapters.stacked import Stack, stacks_of
from svdconvert.checkpoint.tensors import TensorInfo, dtype_code, tensor_bytes
from svdconvert.checkpoint.values import cast_finite
from svdconvert.config.combine import CombineOptions
from svdconvert.config.execution import Run
from svdconvert.config.progress import report
from svdconvert.errors import ArtifactError, RecipeError
from svdconvert.inputs.adapter_group import AdapterGroup
from svdconvert.linalg.low_rank import product_distance, product_norm, truncated
from svdconvert.manifest.fingerprint import checksum
from svdconvert.manifest.results import LoraResult, TruncatedLora, TruncatedModule
from svdconvert.manifest.schema import Manifest, roles_of
from svdconvert.merging.rank_space import combine_products
from svdconvert.output.plan import PlannedFile, plan_file
from svdconvert.output.staging import StagedOutput
from svdconvert.output.tokenizer_files import copy_one_tokenizer, other_tokenizers
from svdconvert.pipeline.adapter_plan import write_stack
from svdconvert.pipeline.combine_settings import Chosen
from svdconvert.pipeline.lora_experts import rank_pattern
from svdconvert.pipeline.lora_formats import base_repository
from svdconvert.pipeline.lora_plan import choose_ranks, exact_factors, refuse_idle_ranks
from svdconvert.pipeline.runner import file_checksums, notes


@dataclass(frozen=True)
class CombinePlan:
    """What will be written."""

    group: AdapterGroup
    chosen: Chosen
    options: CombineOptions
    ranks: Mapping[str, int]
    """Module -> rank; factors of smaller ranks are padded with zeros."""
    dtype: torch.dtype
    file: PlannedFile
    stacks: tuple[Stack, ...] = ()
    """Experts of one parameter, whose factors share tensors; a stack's rank is the largest of its experts."""

    @property
    def single(self) -> list[str]:
        """The modules with tensors of their own."""
        return single_modules(self.group)

    @property
    def rank(self) -> int:
        """The rank in the configuration: the largest of a module that is in no stack."""
        return max(self.ranks[module] for module in self.single or self.ranks)


def plan_combination(group: AdapterGroup, chosen: Chosen, options: CombineOptions) -> CombinePlan:
    """Determine the ranks, with a first pass over the factors if the result is truncated.

    Raises RecipeError for an option that changes nothing for adapters.
    """
    if options.max_shard_size != CombineOptions().max_shard_size:
        raise RecipeError("--max-shard-size changes nothing here: an adapter is one file; leave it out")
    dtype = torch.float32 if options.dtype == "auto" else getattr(torch, options.dtype)
    ranks = {module: _natural_rank(group, chosen, module) for module in group.modules}
    if options.rank is not None:
        is_dense = chosen.method.is_dense
        most = {one: min(group.shape(one)) if is_dense else rank for one, rank in ranks.items()}
        refuse_idle_ranks(most.values(), options)
        ranks = {module: min(options.rank, rank) for module, rank in most.items()}
    elif found := choose_ranks(group.modules, lambda one: _combined(group, chosen, one, None), options):
        ranks = {module: max(1, rank) for module, rank in found.ranks.items()}
    single = single_modules(group)
    rank = max(ranks[module] for module in single or ranks)
    stacks = stacks_of({one: (*group.shape(one), ranks[one]) for one in ranks if one not in single})
    infos = [info for stack in stacks for info in stack.infos(dtype_code(dtype))]
    for module in single:
        rows, columns = group.shape(module)
        infos.append(TensorInfo(key(module, "lora_A"), (rank, columns), dtype_code(dtype)))
        infos.append(TensorInfo(key(module, "lora_B"), (rows, rank), dtype_code(dtype)))
    for name, each in group.parameters.items():
        index, own = next(iter(each.items()))
        adapter = group.deltas[index].adapter
        shape = adapter.source.infos[adapter.extras[own]].shape
        infos.append(TensorInfo(extra_key(name, group.modules), shape, dtype_code(dtype)))
    return CombinePlan(
        group=group,
        chosen=chosen,
        options=options,
        ranks=ranks,
        dtype=dtype,
        file=plan_file(WEIGHTS, infos, "adapter"),
        stacks=tuple(stacks),
    )


def single_modules(group: AdapterGroup) -> list[str]:
    """The modules with tensors of their own: all but experts whose factors share tensors."""
    return [
        module
        for module, each in group.modules.items()
        if not any(own in group.deltas[index].adapter.experts for index, own in each.items())
    ]


def _natural_rank(group: AdapterGroup, chosen: Chosen, module: str) -> int:
    """The rank of a module without truncation."""
    known = [group.rank(index, module) for index in range(len(group.deltas))]
    return max(1, chosen.method.rank([rank for rank in known if rank], group.shape(module)))


def _combined(group: AdapterGroup, chosen: Chosen, module: str, rank: int | None) -> tuple[Tensor, Tensor]:
    """(B, A) in float64 of a module's merged change. Raises ArtifactError if a value is NaN or infinite."""
    products = []
    scales = []
    rows, columns = group.shape(module)
    for index, delta in enumerate(group.deltas):
        own = group.modules[module].get(index)
        if own is None:
            products.append((torch.zeros(rows, 0), torch.zeros(0, columns)))
            scales.append(1.0)
        else:
            products.append(exact_factors(delta, own))
            starts_at_zero = delta.initial_adapter is None and delta.recovered is None
            scales.append(delta.trained(own)[1] if starts_at_zero else 1.0)
    settings = chosen.settings(module, (rows, columns), rank)
    settings = replace(settings, each={**settings.each, "scale": scales})
    left, right = combine_products(chosen.method, products, settings)
    if not (left.isfinite().all() and right.isfinite().all()):
        raise ArtifactError(f"the combined factors of {module} are NaN or infinite; check the weights")
    return left, right


@dataclass(frozen=True)
class CombineJob:
    """The combination of several adapters."""

    plan: CombinePlan
    command: str = "combine"

    @property
    def options(self) -> CombineOptions:
        """The options as the user gave them."""
        return self.plan.options

    @property
    def files(self) -> list[PlannedFile]:
        """The adapter's file."""
        return [self.plan.file]

    @property
    def inputs(self) -> list[Path]:
        """Every directory that is read."""
        group = self.plan.group
        paths = [path for delta in group.deltas for path in delta.input_paths()]
        return [*paths, *([group.base.path] if group.base else [])]

    def identity(self) -> dict[str, Any]:
        """The adapters, in their order, and the base if it is needed."""
        group = self.plan.group
        found: dict[str, Any] = {f"adapter {n}": delta.identity() for n, delta in enumerate(group.deltas, 1)}
        return found | ({"base": group.base.identity()} if group.base else {})

    def write(self, staged: StagedOutput, run: Run) -> None:
        """Write the factors of every module and the parameters trained in full."""
        modules = list(self.plan.group.modules)
        for done, module in enumerate(self.plan.single, 1):
            if module not in staged.finished:
                staged.finish(module, _write_module(self.plan, module, staged))
            report(None, done, len(modules), "modules", name=module)
        done = len(self.plan.single)
        for stack in self.plan.stacks:
            _write_experts(self.plan, stack, staged)
            done += len(stack.members)
            report(None, done, len(modules), "modules", name=stack.parameter)
        for name in self.plan.group.parameters:
            if name not in staged.finished:
                tensor = cast_finite(name, _combined_parameter(self.plan, name), self.plan.dtype)
                stored = extra_key(name, self.plan.group.modules)
                staged.write(self.plan.file.path, stored, tensor)
                checksums = {stored: checksum(tensor_bytes(tensor))}
                staged.finish(name, {"files": {self.plan.file.path: checksums}})

    def write_sidecars(self, directory: Path) -> None:
        """The configuration, and the tokenizer of the first adapter that brings one."""
        (directory / CONFIG).write_text(_config(self.plan).text())
        copy_one_tokenizer(self.plan.group.directories, directory)

    def manifest(self, staged: StagedOutput, threads: int) -> Manifest:
        """The manifest of the combined LoRA."""
        group = self.plan.group
        measured = notes(staged, group.modules).values()
        norm = hypot(*(note["norm"] for note in measured))
        lost = hypot(*(note["lost"] for note in measured))
        known = [delta.manifest for delta in group.deltas if delta.manifest]
        return Manifest(
            kind="lora",
            command="combine",
            layout=known[0].layout if known else "",
            method=self.plan.chosen.name,
            base=next((one.base for one in known if one.base), None),
            options=asdict(self.options) | {"inputs": [str(delta.directory) for delta in group.deltas]},
            result=LoraResult(
                rank=self.plan.rank,
                truncation=_truncation(self.plan, notes(staged, group.modules)),
                rounding=lost / norm if norm else 0.0,
                norm=norm,
                head=known[0].head if known else None,
            ),
            files=file_checksums(staged),
            roles=roles_of(self.files),
            threads=threads,
        )

    def remarks(self, manifest: Manifest) -> Iterator[str]:
        """A warning if the LoRA changes nothing, and if one of several tokenizers was chosen."""
        assert isinstance(manifest.result, LoraResult)
        if not manifest.result.norm:
            yield "the combined LoRA changes nothing: the weighted changes cancel, or there were none"
        yield from other_tokenizers(self.plan.group.directories)


def _write_module(plan: CombinePlan, module: str, staged: StagedOutput) -> dict[str, Any]:
    factors, note = _stored(plan, module, plan.rank)
    checksums = {}
    for factor, tensor in factors.items():
        name = key(module, factor)
        staged.write(plan.file.path, name, tensor)
        checksums[name] = checksum(tensor_bytes(tensor))
    return {"files": {plan.file.path: checksums}, "note": note}


def _write_experts(plan: CombinePlan, stack: Stack, staged: StagedOutput) -> None:
    """Write the factors of all experts of a parameter, which are in memory together."""
    if all(member.module in staged.finished for member in stack.members):
        return
    stored = {one.module: _stored(plan, one.module, one.rank) for one in stack.members}

    def read(module: str, factor: str, rows: slice) -> Tensor:
        return stored[module][0][factor][rows]

    write_stack(staged, plan.file.path, stack, dtype_code(plan.dtype), read)
    for module, (_, note) in stored.items():
        staged.finish(module, {"files": {}, "note": note})


def _stored(plan: CombinePlan, module: str, width: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(the factors of a module, padded to the rank `width`, what the manifest will say of them)."""
    rank = plan.ranks[module]
    product = [*_combined(plan.group, plan.chosen, module, rank)]
    if product[0].shape[1] > rank or _is_truncated(plan.options):
        found = truncated(product, rank)
        left = found.left_OR
        right = found.right_RI
        norm = found.kept
        left_out = found.lost
    else:
        left, right = product
        norm = product_norm(left, right)
        left_out = 0.0
    missing = width - left.shape[1]
    padded = {"lora_A": pad(right, (0, 0, 0, missing)), "lora_B": pad(left, (0, missing))}
    factors = {
        factor: cast_finite(f"{module}.{factor}", tensor, plan.dtype) for factor, tensor in padded.items()
    }
    exact = plan.dtype == torch.float32
    lost = 0.0 if exact else product_distance(left, right, factors["lora_B"], factors["lora_A"])
    return factors, {"norm": norm, "lost": lost, "left_out": left_out}


def _is_truncated(options: CombineOptions) -> bool:
    return any(rule is not None for rule in (options.rank, options.tol, options.rank_budget))


def _truncation(plan: CombinePlan, measured: Mapping[str, Mapping[str, Any]]) -> TruncatedLora | None:
    """The errors of the truncation that the options ask for, by module and in total."""
    if not _is_truncated(plan.options):
        return None
    modules = {}
    for module, note in measured.items():
        whole = hypot(note["norm"], note["left_out"])
        error = note["left_out"] / whole if whole else 0.0
        modules[module] = TruncatedModule(rank=plan.ranks[module], error=error)
    lost = hypot(*(note["left_out"] for note in measured.values()))
    whole = hypot(lost, *(note["norm"] for note in measured.values()))
    return TruncatedLora(error=lost / whole if whole else 0.0, modules=modules)


def _combined_parameter(plan: CombinePlan, name: str) -> Tensor:
    """The common value, or the base's plus the weighted changes; a mean divides by the sum of the weights."""
    group = plan.group
    each = group.trained_parameter(name)
    if group.is_agreed(name):
        return next(iter(each.values()))
    base = group.base_parameter(name)
    weights = [float(weight) for weight in plan.chosen.each["weight"]]
    divisor = sum(weights) if plan.chosen.name == "mean" else 1.0
    total = torch.zeros_like(base)
    for index, tensor in each.items():
        if tensor.shape != base.shape:
            raise ArtifactError(
                f"{group.deltas[index].directory} trained {name} with the shape {tuple(tensor.shape)}, and "
                f"the base has it with {tuple(base.shape)}; combine adapters with one vocabulary"
            )
        total.add_(tensor - base, alpha=weights[index] / divisor)
    return base + total


def _config(plan: CombinePlan) -> AdapterConfig:
    """Scale 1 (alpha is the rank), no patterns but for experts of another rank.

    The base is named if all adapters name the same.
    """
    group = plan.group
    configs = [delta.adapter.config for delta in group.deltas]
    modules = list(group.modules)
    saved, bias = declaration(group.parameters, modules)
    types = {config.peft_type for config in configs} & {PER_EXPERT, WITH_PARAMETERS}
    mixed = contains_adapters(group.parameters, modules)
    bases = {base_repository(delta) for delta in group.deltas}
    targets, parameters = _targets(plan, configs)
    patterns = rank_pattern(plan.stacks, plan.single, plan.rank)
    return AdapterConfig(
        rank=plan.rank,
        alpha=plan.rank,
        targets=targets,
        parameters=parameters,
        rank_pattern=patterns,
        alpha_pattern={name: float(rank) for name, rank in patterns.items()},
        base=bases.pop() if len(bases) == 1 else None,
        task=next((config.task for config in configs if config.task), None),
        modules_to_save=saved,
        bias=bias,
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
        peft_type=PER_EXPERT if PER_EXPERT in types else WITH_PARAMETERS if mixed or types else "LORA",
    )


def _targets(plan: CombinePlan, configs: Sequence[AdapterConfig]) -> tuple[list[str], list[str]]:
    """(target_modules, target_parameters): those of all adapters, or full paths if their names differ."""
    if plan.group.has_one_spelling:
        targets = {target for config in configs for target in config.targets}
        return sorted(targets), sorted({name for config in configs for name in config.parameters})
    named = {module: f"{module}.weight" for module in plan.single}
    dense = [one for one in named if any(config.names_parameter(named[one]) for config in configs)]
    parameters = [*(named[one] for one in dense), *(stack.parameter for stack in plan.stacks)]
    return [one for one in named if one not in dense], parameters
