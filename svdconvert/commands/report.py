"""svdconvert report: one page of HTML about directories, with everything that their files say."""

from collections.abc import Sequence
from pathlib import Path

from svdconvert.config.execution import Run
from svdconvert.config.progress import tracked
from svdconvert.errors import ArtifactError
from svdconvert.linalg.threads import use_threads
from svdconvert.reports.collect import collect
from svdconvert.reports.figures import require_matplotlib
from svdconvert.reports.page import render
from svdconvert.reports.write import check_page, write_page


@tracked
def report(directories: str | Path | Sequence[str | Path], out: str | Path, run: Run | None = None) -> Path:
    """Write a self-contained page about one or more directories or adapters to `out`, and return its path.

    It has what each is, energy, error and kept update by layer and role, spectra, losses, rate, drift,
    truncation, evaluations and samples, as far as their files have them, and says what is missing. No weights
    of a model are read. `out` ends in .html; with `run.overwrite` an unedited report may be replaced. Raises
    MissingPackageError without matplotlib, else SvdConvertError with one sentence.
    """
    run = run or Run()
    path = Path(out)
    given = [directories] if isinstance(directories, str | Path) else list(directories)
    if not given:
        raise ArtifactError("report: give at least one directory")
    require_matplotlib()
    check_page(path, overwrite=run.overwrite)
    use_threads(run.threads)
    write_page(path, render(collect(given)), overwrite=run.overwrite)
    return path
