"""svdconvert merge: merge an adapter into its base or residual, as a plain checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from svdconvert.config.execution import Run
from svdconvert.config.options import MergeOptions
from svdconvert.config.progress import tracked
from svdconvert.inputs.merge_weights import choose_weights
from svdconvert.inputs.open_adapter import open_adapter_delta
from svdconvert.inputs.sources import Sources
from svdconvert.manifest.schema import Manifest
from svdconvert.output.ownership import check_free
from svdconvert.pipeline.effects import refuse_idle_stream
from svdconvert.pipeline.job import run_job
from svdconvert.pipeline.merge import MergeJob
from svdconvert.pipeline.merge_group import GroupMergeJob, open_group_merge
from svdconvert.pipeline.merge_plan import MergePlan, plan_merge


@tracked
def merge(  # noqa: PLR0913 (three locations that override the manifest's)
    adapter: str | Path | Sequence[str | Path],
    out: str | Path,
    options: MergeOptions | None = None,
    run: Run | None = None,
    *,
    base: str | None = None,
    residual: str | None = None,
    init: str | None = None,
) -> Manifest:
    """Merge a trained or untrained adapter into its base or residual, and write a plain checkpoint to `out`.

    `adapter` is a TRAINED, DECOMPOSED or LORA directory or any PEFT LoRA, local or on the Hub, or several of
    them, whose weighted changes are added to the base with one rounding; `base`, `residual` and `init`
    override the locations in the manifest. Raises SvdConvertError with one sentence.
    """
    run = run or Run()
    adapters = [str(adapter)] if isinstance(adapter, str | Path) else [str(one) for one in adapter]
    check_free(Path(out), overwrite=run.overwrite, given=[*adapters, base, residual, init])
    sources = Sources(
        base=base, residual=residual, init=init, stream=run.stream, trust_remote_code=run.trust_remote_code
    )
    options = options or MergeOptions()
    if len(adapters) > 1 or options.weights is not None:
        job = GroupMergeJob(open_group_merge(adapters, options, sources))
        refuse_idle_stream(job.base, run)
        return run_job(job, Path(out), run)
    plan = open_merge(adapters[0], options, sources)
    refuse_idle_stream(plan.weights.model, run)
    return run_job(MergeJob(plan), Path(out), run)


def open_merge(adapter: str | Path, options: MergeOptions, sources: Sources) -> MergePlan:
    """Open everything that a merge reads and plan it from headers. Writes nothing."""
    delta = open_adapter_delta(adapter, sources, options.alpha)
    return plan_merge(choose_weights(delta, options.side, sources), options)
