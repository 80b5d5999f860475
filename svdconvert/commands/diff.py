"""svdconvert diff: where and how much two checkpoints, or two adapters, differ."""

from pathlib import Path

from svdconvert.config.execution import Run
from svdconvert.config.progress import tracked
from svdconvert.errors import ArtifactError
from svdconvert.inputs.model_pair import open_pair
from svdconvert.inputs.open_adapter import is_any_adapter, open_adapter_delta
from svdconvert.pipeline.diff import ModelDiff, compare_models
from svdconvert.pipeline.diff_adapters import AdapterDiff, compare_adapters
from svdconvert.pipeline.effects import refuse_idle_stream_of_pair, refuse_stream_of_adapters


@tracked
def diff(first: str | Path, second: str | Path, run: Run | None = None) -> ModelDiff | AdapterDiff:
    """Compare two plain checkpoints tensor by tensor, or two adapters from their factors alone.

    Each is a directory, a file or org/name[@revision]. Raises SvdConvertError with one sentence, also for an
    adapter and a checkpoint.
    """
    run = run or Run()
    run.ranks.alone("diff")
    adapters = [name for name in (first, second) if is_any_adapter(name)]
    if len(adapters) == 1:
        other = second if adapters == [first] else first
        raise ArtifactError(
            f"{adapters[0]} is an adapter and {other} is a checkpoint: give two of one kind; merge the "
            "adapter first to compare it"
        )
    if adapters:
        refuse_stream_of_adapters(run)
        return compare_adapters(open_adapter_delta(first), open_adapter_delta(second), run)
    pair = open_pair(
        str(first), str(second), "diff", stream=run.stream, trust_remote_code=run.trust_remote_code
    )
    refuse_idle_stream_of_pair(pair, run)
    return compare_models(pair, run)
