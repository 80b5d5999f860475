"""svdconvert combine: merge several adapters into one LoRA, or several checkpoints into one."""

from collections.abc import Sequence
from pathlib import Path

from svdconvert.config.combine import CombineOptions
from svdconvert.config.execution import Run
from svdconvert.manifest.schema import Manifest
from svdconvert.output.ownership import check_free
from svdconvert.pipeline.combine import open_combination
from svdconvert.pipeline.job import run_job


def combine(  # noqa: PLR0913 (two locations besides the inputs)
    inputs: Sequence[str | Path],
    out: str | Path,
    options: CombineOptions | None = None,
    run: Run | None = None,
    *,
    base: str | None = None,
    init: str | None = None,
    config: str | Path | None = None,
) -> Manifest:
    """Merge several adapters of one base into one LoRA, or several checkpoints into one, in `out`.

    Adapters are merged in the joint rank space of their factors; a base is read only if the start of one, or
    a parameter that was trained in full, needs it. Checkpoints are merged one tensor at a time, by the
    options or by `config`, a file in mergekit's format, and then need no `inputs`. Raises SvdConvertError
    with one sentence.
    """
    run = run or Run()
    check_free(Path(out), overwrite=run.overwrite, given=[*inputs, base, init, config])
    job = open_combination(
        [str(one) for one in inputs], options or CombineOptions(), run, base=base, init=init, config=config
    )
    return run_job(job, Path(out), run)
