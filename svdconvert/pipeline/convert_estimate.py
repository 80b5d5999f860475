"""convert --plan: what would be read and written, in which files, and under which names."""

from dataclasses import dataclass

from svdconvert.pipeline.convert import ConvertPlan
from svdconvert.pipeline.estimate import copy_seconds, memory_of_tensors

_TENSORS = 2  # that are in memory at the same time: one that is read and one that is written


@dataclass(frozen=True)
class ConvertEstimate:
    """What a conversion would read and write. Sizes in bytes, time in seconds."""

    layout: str
    tensors: int
    cast: int
    """Tensors that change their element type."""
    read: int
    written: int
    files: list[str]
    memory: int
    seconds: float


def estimate_conversion(plan: ConvertPlan) -> ConvertEstimate:
    """Estimate from headers: sizes are exact, memory and time approximate."""
    infos = [*plan.view.infos.values()]
    read = sum(info.nbytes for info in infos)
    written = sum(file.nbytes for file in plan.files)
    return ConvertEstimate(
        layout=plan.name,
        tensors=len(infos),
        cast=len(plan.dtypes),
        read=read,
        written=written,
        files=[file.path for file in plan.files],
        memory=memory_of_tensors(infos, _TENSORS),
        seconds=copy_seconds(read + written),
    )
