"""svdconvert verify: recompute what a directory's manifest claims."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.config.execution import Run
from svdconvert.config.progress import Progress
from svdconvert.hub.download import fetch
from svdconvert.inputs.model import find_model
from svdconvert.inputs.open_adapter import open_initial_adapter
from svdconvert.linalg.threads import parallel_matrices, worker_pool
from svdconvert.manifest.schema import Manifest, read_manifest
from svdconvert.pipeline.verify import MatrixCheck, check_files, check_matrix, check_sidecars


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    directory: Path
    kind: str
    tensors: int
    """Stored tensors whose checksums were compared."""
    matrices: int
    """Matrices that were compared with the base; 0 where it is not at hand."""
    base: str | None
    """Where the base was found."""
    worst: float
    """Largest relative reconstruction error."""
    exact: float | None
    """Share of the adapted entries that come back bit for bit from the stored files."""
    faults: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True where everything is as the manifest says."""
        return not self.faults


def verify(directory: str | Path, run: Run | None = None, *, base: str | None = None) -> Report:
    """Compare a directory's tensors with their checksums and, where the base is at hand, its errors.

    Raises SvdConvertError where the directory cannot be read at all; what is read and wrong is in the
    report.
    """
    run = run or Run()
    path = fetch(str(directory)).path
    manifest = read_manifest(path)
    faults = []
    tensors = 0
    total = sum(len(marks) for marks in manifest.files.values())
    for file, name, fault in check_files(path, manifest):
        tensors += 1
        run.track(Progress(name, file, tensors, total))
        if fault:
            faults.append(f"{path / file}: {name} {fault}")
    faults += [f"{path / name} {fault}" for name, fault in check_sidecars(path, manifest)]
    home = find_model(manifest.base, base) if base or manifest.kind == "decomposed" else None
    if manifest.kind != "decomposed":
        home = None  # it was compared with the manifest, and there is nothing to recompute
    checks = list(_matrices(path, manifest, home.source, run)) if home else []
    faults += [f"{check.name}: {fault}" for check in checks for fault in check.faults]
    entries = sum(check.entries for check in checks)
    return Report(
        directory=Path(directory),
        kind=manifest.kind,
        tensors=tensors,
        matrices=len(checks),
        base=home.snapshot.location if home else None,
        worst=max((check.error for check in checks), default=0.0),
        exact=sum(check.exact for check in checks) / entries if entries else None,
        faults=faults,
    )


def _matrices(path: Path, manifest: Manifest, base: TensorSource, run: Run) -> Iterator[MatrixCheck]:
    initial = open_initial_adapter(path, manifest)
    residual = open_checkpoint(path) if manifest.base_is_residual else None
    total = sum(base.infos[name].nbytes for name in manifest.matrices)
    done = 0
    # A residual that is missing is a fault of its file already.
    names = [name for name in manifest.matrices if residual is None or name in residual.infos]
    with worker_pool(parallel_matrices(torch.device("cpu"))) as pool:
        for check in pool.map(
            lambda name: check_matrix(initial, manifest.matrices[name], name, base, residual), names
        ):
            yield check
            done += base.infos[check.name].nbytes
            run.track(Progress(check.name, "base", done, total))
