"""svdconvert inspect: describes a directory or model, and lists the commands that can follow."""

from pathlib import Path

from svdconvert.inputs.engines import Engine
from svdconvert.inputs.inspection import Inspection, describe, describe_for


def inspect(
    model: str | Path, engine: Engine | None = None, *, trust_remote_code: bool = False
) -> Inspection:
    """Describe a directory, a file or a model of the Hub, from headers and manifests alone.

    With an `engine`, `model` is an adapter, and the description says what that engine will refuse or ignore
    of it. With `trust_remote_code`, code of the repository of a checkpoint may run, to find its layout.
    Raises SvdConvertError if it is of no known kind.
    """
    return (
        describe(model, trust_remote_code=trust_remote_code)
        if engine is None
        else describe_for(model, engine)
    )
