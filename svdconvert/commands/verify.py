"""svdconvert verify: recompute what a manifest claims, or audit a merge that any program made."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from svdconvert.config.execution import Run
from svdconvert.config.progress import tracked
from svdconvert.errors import ArtifactError
from svdconvert.hub.download import fetch
from svdconvert.inputs.config_differences import differing_settings
from svdconvert.inputs.merge_weights import choose_weights
from svdconvert.inputs.model import find_model, open_plain_model
from svdconvert.inputs.open_adapter import open_adapter_delta
from svdconvert.inputs.sources import Sources
from svdconvert.manifest.claims import evaluation_faults
from svdconvert.manifest.evaluations import result_paths
from svdconvert.manifest.schema import read_manifest
from svdconvert.pipeline.merge_audit import BaseAudit, MergeAudit, audit_merge
from svdconvert.pipeline.verify import Report, check_directory


@tracked
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
    report, and so are results of `eval` that belong to other weights or do not follow from their answers.
    Raises SvdConvertError with one sentence if the directory cannot be read at all.
    """
    path = fetch(str(directory)).path
    manifest = read_manifest(path)
    found = find_model(manifest.base, base) if base or manifest.kind == "decomposed" else None
    model = found if manifest.kind == "decomposed" else None  # others have nothing to recompute from it
    report = check_directory(path, manifest, model, run or Run(), nuclear_ratio)
    report = replace(report, base=found.snapshot.location if found else None)
    faults = [*report.faults, *evaluation_faults(path, manifest)]
    return replace(report, directory=Path(directory), evaluations=len(result_paths(path)), faults=faults)


@tracked
def verify_merge(
    merged: str | Path, bases: Sequence[str | Path], adapter: str | Path, run: Run | None = None
) -> MergeAudit:
    """Compare the checkpoint `merged` with what merging `adapter` into each of `bases` gives.

    Any program may have made it. Each adapted matrix is W + sBA under one rounding, or in PEFT's order of
    rounding, or the base's, or something else; the differences are in the audit. Raises SvdConvertError if
    one of them cannot be read.
    """
    run = run or Run()
    run.ranks.alone("verify")
    if not bases:
        raise ArtifactError(f"{merged} was merged from a base that is not given; add --base BASE")
    opened = open_plain_model(str(merged), "verify --merged", trust_remote_code=run.trust_remote_code)
    audits = []
    for base in map(str, bases):
        sources = Sources(base=base, trust_remote_code=run.trust_remote_code)
        try:
            weights = choose_weights(open_adapter_delta(adapter, sources), "base", sources)
            if settings := differing_settings(weights.model, opened):
                run.notify(f"config.json of {merged} and of {base} differ in {settings}")
            audits.append(audit_merge(opened, weights, run))
        except ArtifactError as error:
            if len(bases) == 1:
                raise
            audits.append(BaseAudit(base, [], [str(error)]))
    return MergeAudit(str(merged), str(adapter), audits)
