"""svdconvert verify: recompute the checksums and errors in a directory's manifest."""

from dataclasses import replace
from pathlib import Path

from svdconvert.config.execution import Run
from svdconvert.hub.download import fetch
from svdconvert.inputs.model import find_model
from svdconvert.manifest.schema import read_manifest
from svdconvert.pipeline.verify import Report, check_directory


def verify(
    directory: str | Path,
    run: Run | None = None,
    *,
    base: str | None = None,
    nuclear_ratio: str | None = None,
) -> Report:
    """Compare a directory's files with their checksums and, if its base is found, its matrices with the base.

    `base` overrides the base's location in the manifest. `nuclear_ratio` measures the nuclear norms of a
    4-bit residual's errors too: "all", or a number of matrices per role, as text. Differences are in the
    report. Raises SvdConvertError with one sentence if the directory cannot be read at all.
    """
    path = fetch(str(directory)).path
    manifest = read_manifest(path)
    model = find_model(manifest.base, base) if base or manifest.kind == "decomposed" else None
    if manifest.kind != "decomposed":
        model = None  # only its identity is checked: other directories have nothing to recompute from it
    report = check_directory(path, manifest, model, run or Run(), nuclear_ratio)
    return replace(report, directory=Path(directory))
