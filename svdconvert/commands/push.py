"""svdconvert push: publish a finished directory as a repository of the Hub."""

from pathlib import Path

from svdconvert.config.execution import Run
from svdconvert.config.options import PushOptions
from svdconvert.config.progress import tracked
from svdconvert.publish.upload import Destination, Published, PushEstimate, estimate_push, upload


@tracked
def push(
    directory: str | Path,
    repository: str,
    options: PushOptions | None = None,
    *,
    base: str | None = None,
    residual: str | None = None,
    run: Run | None = None,
) -> Published:
    """Publish a directory that svdconvert wrote as org/name, with a card.

    Files that the Hub already has are not sent again.

    `base` and `residual` are the repositories of models that were read from a local directory; of `run` only
    `track` and `notify` count: it is called with a sentence for each such model that is not given. Raises
    SvdConvertError with one sentence; the same push can be repeated.
    """
    destination = Destination(
        repository=repository, options=options or PushOptions(), base=base, residual=residual
    )
    return upload(Path(directory), destination, (run or Run()).notify)


@tracked
def plan_push(
    directory: str | Path,
    repository: str,
    options: PushOptions | None = None,
    run: Run | None = None,
    *,
    base: str | None = None,
    residual: str | None = None,
) -> PushEstimate:
    """Say which files `push` would send. Sends and changes nothing, and needs no token.

    Raises SvdConvertError with one sentence.
    """
    destination = Destination(
        repository=repository, options=options or PushOptions(), base=base, residual=residual
    )
    return estimate_push(Path(directory), destination)
