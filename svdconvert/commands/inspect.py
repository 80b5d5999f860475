"""svdconvert inspect: describes a directory or model, and lists the commands that can follow."""

from pathlib import Path

from svdconvert.inputs.inspection import Inspection, describe


def inspect(model: str | Path) -> Inspection:
    """Describe a directory, a file or a model of the Hub, from headers and manifests alone.

    Raises SvdConvertError if it is of no known kind.
    """
    return describe(model)
