"""combine --plan: what would be read and written, from headers."""

from dataclasses import dataclass

from svdconvert.pipeline.combine_adapters import CombineJob
from svdconvert.pipeline.combine_checkpoints import CheckpointJob
from svdconvert.pipeline.estimate import copy_seconds, memory_of_blocks, memory_of_tensors
from svdconvert.pipeline.job import Job


@dataclass(frozen=True, kw_only=True)
class CombineEstimate:
    """What `combine` would do. Sizes in bytes, time in seconds."""

    kind: str
    """adapters or checkpoints."""
    method: str
    inputs: int
    matrices: int
    """Modules of the adapters, or tensors of the checkpoint that are merged."""
    rank: int | None
    """The largest rank of a combined adapter; None for checkpoints."""
    read: int
    written: int
    files: tuple[str, ...]
    memory: int
    seconds: float


def estimate_combination(job: Job) -> CombineEstimate:
    """Sizes are exact, memory and time approximate. `job` is what `open_combination` returns."""
    assert isinstance(job, CombineJob | CheckpointJob)
    files = job.files
    written = sum(file.nbytes for file in files)
    if isinstance(job, CombineJob):
        sources = [delta.adapter.source for delta in job.plan.group.deltas]
        method = job.plan.chosen.name
        in_blocks = False
        matrices = len(job.plan.ranks)
        rank: int | None = job.plan.rank
    else:
        sources = [model.source for model in job.plan.models]
        method = job.plan.method_name
        in_blocks = job.plan.method.changes is None
        matrices = len(job.plan.dtypes)
        rank = None
    infos = [info for source in sources for info in source.infos.values()]
    read = sum(info.nbytes for info in infos)
    return CombineEstimate(
        kind="adapters" if rank is not None else "checkpoints",
        method=method,
        matrices=matrices,
        inputs=len(sources),
        rank=rank,
        read=read,
        written=written,
        files=tuple(file.path for file in files),
        memory=memory_of_blocks(infos, len(sources))
        if in_blocks
        else memory_of_tensors(infos, len(sources) + 1),
        seconds=copy_seconds(read + written),
    )
