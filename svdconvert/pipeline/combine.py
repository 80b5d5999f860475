"""combine: whether the inputs are adapters or checkpoints, and the job that merges them."""

from collections.abc import Sequence
from pathlib import Path

from svdconvert.adapters.peft_files import is_adapter
from svdconvert.adapters.rwkv_peft import is_adapter_file
from svdconvert.config.combine import CombineOptions
from svdconvert.config.execution import Run
from svdconvert.errors import ArtifactError, RecipeError
from svdconvert.hub.download import fetch
from svdconvert.inputs.adapter_group import open_group
from svdconvert.inputs.sources import NO_INIT, Sources
from svdconvert.manifest.schema import PLAIN, has_manifest, read_manifest
from svdconvert.pipeline.combine_adapters import CombineJob, plan_combination
from svdconvert.pipeline.combine_settings import choose
from svdconvert.pipeline.job import Job


def open_combination(  # noqa: PLR0913 (three locations besides the inputs)
    inputs: Sequence[str],
    options: CombineOptions,
    run: Run,
    *,
    base: str | None = None,
    init: str | None = None,
    config: str | Path | None = None,
) -> Job:
    """Open the inputs and plan from headers. Raises ArtifactError if adapters and checkpoints are mixed."""
    if config is not None:
        raise RecipeError("--config is not there yet")
    if not inputs:
        raise RecipeError("combine needs two inputs or more, or --config with a file in mergekit's format")
    kinds = {_is_adapter(one): one for one in inputs}
    if len(kinds) > 1:
        raise ArtifactError(
            f"{kinds[True]} is an adapter and {kinds[False]} a checkpoint, which are not merged with each "
            "other; merge the adapter into its base first"
        )
    if True in kinds:
        return _adapters(inputs, options, run, base=base, init=init)
    raise RecipeError("checkpoints are not there yet")


def _adapters(
    inputs: Sequence[str], options: CombineOptions, run: Run, *, base: str | None, init: str | None
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
    group = open_group(inputs, Sources(base=base, init=init))
    return CombineJob(plan_combination(group, chosen, options))


def _is_adapter(location: str) -> bool:
    """True for an adapter of any format, False for anything that may be a checkpoint."""
    path = Path(location)
    path = path if path.exists() else fetch(location, "sidecars").path
    if path.is_dir() and has_manifest(path):
        return read_manifest(path).kind not in PLAIN
    return is_adapter(path) if path.is_dir() else is_adapter_file(path)
