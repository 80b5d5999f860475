"""combine: whether the inputs are adapters or checkpoints, and the job that merges them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from svdconvert.adapters.peft_files import is_adapter
from svdconvert.adapters.rwkv_peft import is_adapter_file
from svdconvert.checkpoint.safetensors_files import open_file
from svdconvert.config.combine import CombineOptions
from svdconvert.config.execution import Run
from svdconvert.config.mergekit_file import (
    Condition,
    MergeFile,
    Settings,
    Slice,
    SliceSource,
    read_merge_file,
)
from svdconvert.errors import ArtifactError, RecipeError
from svdconvert.hub.download import fetch
from svdconvert.inputs.adapter_group import open_group
from svdconvert.inputs.model import open_plain_model
from svdconvert.inputs.sources import NO_INIT, Sources
from svdconvert.manifest.schema import PLAIN, has_manifest, read_manifest
from svdconvert.pipeline.checkpoint_plan import CheckpointPlan, plan_checkpoint
from svdconvert.pipeline.combine_adapters import CombineJob, plan_combination
from svdconvert.pipeline.combine_checkpoints import CheckpointJob
from svdconvert.pipeline.combine_settings import choose, find_method
from svdconvert.pipeline.job import Job


def open_combination(  # noqa: PLR0913 (four locations besides the inputs)
    inputs: Sequence[str],
    options: CombineOptions,
    run: Run,
    *,
    base: str | None = None,
    residual: str | None = None,
    init: str | None = None,
    config: str | Path | None = None,
) -> Job:
    """Open the inputs and plan from headers. Raises ArtifactError if adapters and checkpoints are mixed."""
    if config is not None:
        _refuse_for_checkpoints(residual, init, options)
        return _of_file(Path(config), inputs, options, run, base=base)
    if not inputs:
        raise RecipeError("combine needs two inputs or more, or --config with a file in mergekit's format")
    kinds = {_is_adapter(one): one for one in inputs}
    if len(kinds) > 1:
        raise ArtifactError(
            f"{kinds[True]} is an adapter and {kinds[False]} a checkpoint, which are not merged with each "
            "other; merge the adapter into its base first"
        )
    if True in kinds:
        return _adapters(inputs, options, run, base=base, residual=residual, init=init)
    _refuse_for_checkpoints(residual, init, options)
    return _checkpoints(inputs, options, run, base=base)


def _refuse_for_checkpoints(residual: str | None, init: str | None, options: CombineOptions) -> None:
    """Raise RecipeError for what only adapters have."""
    for name, value in (("residual", residual), ("init", init), ("alpha", options.alpha)):
        if value is not None:
            raise RecipeError(f"--{name} changes nothing here: it is for adapters; leave it out")


def _adapters(
    inputs: Sequence[str],
    options: CombineOptions,
    run: Run,
    *,
    base: str | None,
    residual: str | None,
    init: str | None,
) -> CombineJob:
    run.ranks.alone("combine")
    if init not in (None, NO_INIT):
        raise RecipeError(
            f"--init {init} names one initial adapter for several adapters; convert that adapter with "
            "to-lora first, or give --init none"
        )
    if run.stream:
        raise RecipeError("--stream changes nothing here: adapters are small; leave it out")
    chosen = choose(options, "adapters", len(inputs))
    sources = Sources(base=base, residual=residual, init=init, trust_remote_code=run.trust_remote_code)
    group = open_group(inputs, sources, options.alpha)
    if len(inputs) == 1 and group.parameters and chosen.each["weight"] != (1.0,):
        raise RecipeError(
            f"{inputs[0]} trained {next(iter(group.parameters))} in full, which --weights does not scale for "
            "a single adapter; merge it into its base with --weights"
        )
    return CombineJob(plan_combination(group, chosen, options))


def _checkpoints(
    inputs: Sequence[str], options: CombineOptions, run: Run, *, base: str | None
) -> CheckpointJob:
    """The merge that the options describe, as a file in mergekit's format would."""
    if used := [name for name in ("tol", "rank_budget") if getattr(options, name) is not None]:
        raise RecipeError(
            f"--{used[0].replace('_', '-')} changes nothing here: it truncates adapters; leave it out"
        )
    models = [one for one in inputs if one != base]
    chosen = choose(options, "checkpoints", len(models))
    if base is not None and chosen.method.base != "needed":
        raise RecipeError(f"--base changes nothing here: {chosen.name} has no base; give it as an input")
    sources = tuple(
        SliceSource(model, parameters={name: (Condition(values[n]),) for name, values in chosen.each.items()})
        for n, model in enumerate(models)
    )
    if chosen.method.parameter("weight") is None:
        sources = tuple(replace(source, parameters=_without_weight(source)) for source in sources)
    shared = {name: (Condition(value),) for name, value in chosen.shared.items()}
    file = MergeFile(chosen.name, (Slice(sources),), base, shared)
    return CheckpointJob(_planned(file, options, run, "combine"))


def _without_weight(source: SliceSource) -> Settings:
    return {name: setting for name, setting in (source.parameters or {}).items() if name != "weight"}


def _of_file(
    path: Path, inputs: Sequence[str], options: CombineOptions, run: Run, *, base: str | None
) -> CheckpointJob:
    """The merge that a file in mergekit's format describes."""
    if inputs or base is not None:
        raise RecipeError(f"{path} names the models; give no inputs and no --base with --config")
    usual = CombineOptions()
    for name in ("method", "weights", "density", "set", "rank", "tol", "rank_budget"):
        if getattr(options, name) != getattr(usual, name):
            raise RecipeError(
                f"--{name.replace('_', '-')} is for merges without --config; write it into {path}"
            )
    file = read_merge_file(path)
    method = find_method(file.method, "checkpoints")
    if options.seed and not method.draws:
        raise RecipeError(f"--seed changes nothing here: {file.method} draws no random numbers; leave it out")
    return CheckpointJob(_planned(file, options, run, str(path)), from_file=True)


def _planned(file: MergeFile, options: CombineOptions, run: Run, place: str) -> CheckpointPlan:
    """Open all models and plan. Raises as `plan_checkpoint` and `open_plain_model`."""
    names = [source.model for part in file.slices for source in part.sources]
    bases = [part.base for part in file.slices if part.base] + ([file.base] if file.base else [])
    find_method(file.method, "checkpoints")
    models = {
        name: open_plain_model(name, "combine", stream=run.stream, trust_remote_code=run.trust_remote_code)
        for name in dict.fromkeys([*names, *bases])
    }
    if (
        run.stream
        and run.shard_sink is None
        and all(one.snapshot.revision is None for one in models.values())
    ):
        raise RecipeError("--stream changes nothing here: all models are on this disk, and nothing is pushed")
    return plan_checkpoint(models, file, options, place)


def _is_adapter(location: str) -> bool:
    """True for an adapter of any format, False for anything that may be a checkpoint."""
    path = Path(location)
    path = path if path.exists() else fetch(location, "sidecars").path
    if path.is_dir() and has_manifest(path):
        return read_manifest(path).kind not in PLAIN
    if path.is_dir():
        return is_adapter(path)
    return is_adapter_file(path) and any(name.endswith(".lora_A") for name in open_file(path).infos)
