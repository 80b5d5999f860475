"""svdconvert convert: write a checkpoint's tensors under the names of another layout."""

from pathlib import Path

from svdconvert.config.execution import Run
from svdconvert.config.options import ConvertOptions
from svdconvert.config.progress import tracked
from svdconvert.inputs.model import open_plain_model
from svdconvert.manifest.schema import Manifest
from svdconvert.output.ownership import check_free
from svdconvert.pipeline.convert import ConvertJob, plan_conversion
from svdconvert.pipeline.convert_estimate import ConvertEstimate, estimate_conversion
from svdconvert.pipeline.effects import refuse_idle_stream
from svdconvert.pipeline.job import run_job


@tracked
def convert(model: str | Path, out: str | Path, options: ConvertOptions, run: Run | None = None) -> Manifest:
    """Write the tensors of `model` in another layout of its family, one tensor at a time, in `out`.

    Nothing but names, shapes and order changes unless `options` names another element type, so converting
    back gives the same bytes. Raises SvdConvertError with one sentence.
    """
    run = run or Run()
    check_free(Path(out), overwrite=run.overwrite, given=[model])
    opened = open_plain_model(str(model), "convert", stream=run.stream)
    refuse_idle_stream(opened, run)
    return run_job(ConvertJob(opened, plan_conversion(opened, options), options), Path(out), run)


@tracked
def plan_convert(model: str | Path, options: ConvertOptions) -> ConvertEstimate:
    """Estimate the output of `convert` from headers. Writes nothing."""
    opened = open_plain_model(str(model), "convert", stream=True)
    return estimate_conversion(plan_conversion(opened, options))
