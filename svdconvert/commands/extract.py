"""svdconvert extract: write the difference of two checkpoints as a LoRA for the first."""

from pathlib import Path

from svdconvert.config.execution import Run
from svdconvert.config.options import ExtractOptions
from svdconvert.config.progress import tracked
from svdconvert.inputs.model_pair import Difference, open_pair
from svdconvert.manifest.schema import Manifest
from svdconvert.output.ownership import check_free
from svdconvert.pipeline.effects import refuse_idle_stream_of_pair
from svdconvert.pipeline.extract import ExtractJob
from svdconvert.pipeline.extract_estimate import ExtractEstimate, estimate_extraction
from svdconvert.pipeline.extract_plan import plan_extraction
from svdconvert.pipeline.job import run_job


@tracked
def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    options: ExtractOptions | None = None,
    run: Run | None = None,
) -> Manifest:
    """Write the change from `base` to `tuned` to `out`, as a standard PEFT LoRA for `base`.

    Both are plain checkpoints: a directory, a single file or org/name[@revision]. The change is computed in
    float32, and the error of every matrix is measured. Raises SvdConvertError with one sentence.
    """
    run = run or Run()
    check_free(Path(out), overwrite=run.overwrite, given=[base, tuned])
    pair = open_pair(
        str(base), str(tuned), "extract", stream=run.stream, trust_remote_code=run.trust_remote_code
    )
    refuse_idle_stream_of_pair(pair, run)
    plan = plan_extraction(pair, options or ExtractOptions())
    return run_job(ExtractJob(plan, Difference(plan.pair)), Path(out), run)


@tracked
def plan_extract(
    base: str | Path,
    tuned: str | Path,
    options: ExtractOptions | None = None,
    run: Run | None = None,
    *,
    sketch: bool = False,
) -> ExtractEstimate:
    """Estimate the output of `extract` from headers; with `sketch` also the error that each rank would have.

    The sketch reads all weights once. Writes nothing.
    """
    run = run or Run()
    run.ranks.alone("extract --plan")
    pair = open_pair(str(base), str(tuned), "extract", stream=True, trust_remote_code=run.trust_remote_code)
    return estimate_extraction(plan_extraction(pair, options or ExtractOptions()), run, sketch=sketch)
