"""The frame of every command that writes a directory.

A command opens its inputs, plans a job from their headers, and gives it to `run_job`. What is the same for
all commands is written here once: the output is checked against the inputs, the number of threads is settled,
an interrupted run is recognised by its identity, the files appear together, and the manifest is written last.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from svdconvert.config.execution import Run
from svdconvert.linalg.threads import use_threads
from svdconvert.manifest.compared import sidecar_remarks
from svdconvert.manifest.schema import Manifest, run_identity, sidecar_checksums
from svdconvert.output.ownership import check_apart
from svdconvert.output.plan import PlannedFile
from svdconvert.output.sidecars import untie_different
from svdconvert.output.staging import StagedOutput, recorded


class Job(Protocol):
    """What one command will write, planned from headers alone."""

    @property
    def command(self) -> str:
        """The command's name on the command line."""
        ...

    @property
    def options(self) -> Any:
        """The options as the user gave them, defaults included."""
        ...

    @property
    def files(self) -> Sequence[PlannedFile]:
        """Every file of tensors that is planned from headers; `write` may add more to the staged output."""
        ...

    @property
    def inputs(self) -> Sequence[Path]:
        """Directories and files that are read; the output must not overlap them."""
        ...

    def identity(self) -> dict[str, Any]:
        """Describes the inputs: an interrupted run continues only if this is unchanged."""
        ...

    def write(self, staged: StagedOutput, run: Run) -> None:
        """Write all tensors that are not finished yet or, with several ranks, this rank's share of them."""
        ...

    def write_sidecars(self, directory: Path) -> None:
        """Write everything else, except the manifest. Called in the leading rank only."""
        ...

    def manifest(self, staged: StagedOutput, threads: int) -> Manifest:
        """The manifest of the finished output."""
        ...

    def remarks(self, manifest: Manifest) -> Iterable[str]:
        """Sentences to show to the user when the work is done."""
        ...


def run_job(job: Job, out: Path, run: Run) -> Manifest:
    """Run a job, or continue an interrupted one; `out` appears complete or not at all.

    Raises OutputError if `out` exists already, overlaps an input, or was started by another run.
    """
    check_apart(out, *job.inputs)
    if run.ranks.leads:
        for remark in sidecar_remarks(job.inputs):
            run.notify(remark)
    threads = use_threads(run.threads or recorded(out, "threads"))
    identity = run_identity(job.command, asdict(job.options), threads) | job.identity()
    with StagedOutput(out, job.files, identity, run) as staged:
        job.write(staged, run)
        manifest = job.manifest(staged, threads)
        if run.ranks.leads:
            job.write_sidecars(staged.path)
            untie_different(staged.path, manifest.files)
            manifest = replace(manifest, sidecars=sidecar_checksums(staged.path, staged.files))
            manifest.write(staged.path)
    if run.ranks.leads:
        for remark in job.remarks(manifest):
            run.notify(remark)
    return manifest
