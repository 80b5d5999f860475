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
from svdconvert.manifest.schema import Manifest, run_identity, sidecar_checksums
from svdconvert.output.ownership import check_apart
from svdconvert.output.plan import PlannedFile
from svdconvert.output.sidecars import untie_different
from svdconvert.output.staging import StagedOutput, recorded


class Job(Protocol):
    """What one command will write, known from headers alone."""

    @property
    def command(self) -> str:
        """The command's name, as it is typed."""
        ...

    @property
    def options(self) -> Any:
        """The command's options class, as it was asked for."""
        ...

    @property
    def files(self) -> Sequence[PlannedFile]:
        """Every file of tensors."""
        ...

    @property
    def inputs(self) -> Sequence[Path]:
        """Directories and files that are read, which the output must not overlap."""
        ...

    def identity(self) -> dict[str, Any]:
        """What of the inputs must be unchanged for an interrupted run to continue."""
        ...

    def write(self, staged: StagedOutput, run: Run) -> None:
        """Write every tensor that is not finished yet; with several ranks, this rank's share."""
        ...

    def write_sidecars(self, directory: Path) -> None:
        """Write everything else, except the manifest. Called in the leading rank only."""
        ...

    def manifest(self, staged: StagedOutput, threads: int) -> Manifest:
        """The manifest of the finished output."""
        ...

    def remarks(self, manifest: Manifest) -> Iterable[str]:
        """Sentences that the user should read now that the work is done."""
        ...


def run_job(job: Job, out: Path, run: Run) -> Manifest:
    """Do the job, or continue it, so that `out` appears complete or not at all.

    Raises OutputError if `out` is taken, overlaps an input, or was begun by another run.
    """
    check_apart(out, *job.inputs)
    threads = use_threads(run.threads or recorded(out, "threads"))
    identity = run_identity(job.command, asdict(job.options), threads) | job.identity()
    with StagedOutput(out, job.files, identity, run) as staged:
        job.write(staged, run)
        manifest = job.manifest(staged, threads)
        if run.ranks.leads:
            job.write_sidecars(staged.path)
            untie_different(staged.path, manifest.files)
            manifest = replace(manifest, sidecars=sidecar_checksums(staged.path, job.files))
            manifest.write(staged.path)
    if run.ranks.leads:
        for remark in job.remarks(manifest):
            run.notify(remark)
    return manifest
