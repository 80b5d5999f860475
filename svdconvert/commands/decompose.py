"""svdconvert decompose: split a checkpoint into a residual base and an initial adapter."""

from pathlib import Path

from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.config.progress import tracked
from svdconvert.inputs.model import open_headers, open_plain_model
from svdconvert.manifest.schema import Manifest
from svdconvert.output.ownership import check_free
from svdconvert.pipeline.decompose import DecomposeJob
from svdconvert.pipeline.decompose_plan import plan_decomposition
from svdconvert.pipeline.effects import refuse_idle_stream
from svdconvert.pipeline.estimate import Estimate, estimate_decompose
from svdconvert.pipeline.job import run_job


@tracked
def decompose(
    model: str | Path, out: str | Path, options: SplitOptions | None = None, run: Run | None = None
) -> Manifest:
    """Split the target matrices of `model` into a residual base and an initial adapter, in `out`.

    `model` is a directory, a single file or org/name[@revision]. Raises SvdConvertError with one sentence.
    """
    run = run or Run()
    check_free(Path(out), overwrite=run.overwrite, given=[model])
    opened = open_plain_model(
        str(model), "decompose", stream=run.stream, trust_remote_code=run.trust_remote_code
    )
    refuse_idle_stream(opened, run)
    plan = plan_decomposition(opened, options or SplitOptions())
    return run_job(DecomposeJob(opened, plan), Path(out), run)


def plan_decompose(
    model: str | Path, options: SplitOptions | None = None, *, trust_remote_code: bool = False
) -> Estimate:
    """Estimate the output, memory and time of `decompose` from headers alone. Writes nothing."""
    opened = open_headers(str(model), "decompose", trust_remote_code=trust_remote_code)
    return estimate_decompose(plan_decomposition(opened, options or SplitOptions()))
