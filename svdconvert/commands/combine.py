"""svdconvert combine: merge several adapters into one LoRA, or several checkpoints into one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svdconvert.config.combine import CombineOptions
from svdconvert.config.execution import Run
from svdconvert.config.progress import tracked
from svdconvert.manifest.schema import Manifest
from svdconvert.output.ownership import check_free
from svdconvert.pipeline.combine import open_combination
from svdconvert.pipeline.combine_estimate import CombineEstimate, estimate_combination
from svdconvert.pipeline.job import Job, run_job


@tracked
def combine(  # noqa: PLR0913 (three locations besides the inputs)
    inputs: Sequence[str | Path],
    out: str | Path,
    options: CombineOptions | None = None,
    run: Run | None = None,
    *,
    base: str | None = None,
    residual: str | None = None,
    init: str | None = None,
    config: str | Path | None = None,
) -> Manifest:
    """Merge several adapters of one base into one LoRA, or several checkpoints into one, in `out`.

    Adapters are merged in the joint rank space of their factors. A base is read only if the start of one, or
    a parameter that was trained in full, needs it; `residual` is that of adapters whose start is not stored.
    Checkpoints are merged one tensor at a time, by the options or by `config`, a file in mergekit's format,
    and then need no `inputs`. Raises SvdConvertError with one sentence.
    """
    run = run or Run()
    check_free(Path(out), overwrite=run.overwrite, given=[*inputs, base, residual, init, config])
    places = {"base": base, "residual": residual, "init": init, "config": config}
    return run_job(_open(inputs, options, run, **places), Path(out), run)


@tracked
def plan_combine(  # noqa: PLR0913 (as combine, without an output)
    inputs: Sequence[str | Path],
    options: CombineOptions | None = None,
    run: Run | None = None,
    *,
    base: str | None = None,
    residual: str | None = None,
    init: str | None = None,
    config: str | Path | None = None,
) -> CombineEstimate:
    """Say what `combine` would read and write. Writes nothing.

    Reads headers; of adapters that are truncated also the factors. Raises SvdConvertError with one sentence.
    """
    places = {"base": base, "residual": residual, "init": init, "config": config}
    return estimate_combination(_open(inputs, options, run or Run(), **places))


def _open(inputs: Sequence[str | Path], options: CombineOptions | None, run: Run, **places: Any) -> Job:
    return open_combination([str(one) for one in inputs], options or CombineOptions(), run, **places)
