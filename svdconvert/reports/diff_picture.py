"""The picture of `diff`: how much every layer and role changed."""

import os
from pathlib import Path

from svdconvert.errors import OutputError
from svdconvert.output.rename import rename_to_free_name
from svdconvert.pipeline.diff import ModelDiff
from svdconvert.pipeline.diff_adapters import AdapterDiff
from svdconvert.reports.heatmap import heatmap

ENDING = ".svg"


def check_picture(path: Path) -> None:
    """Raise OutputError if a picture cannot be written to `path`, before any work is done."""
    if path.suffix != ENDING:
        raise OutputError(f"{path} does not end in {ENDING}; the picture is an SVG, so give a name that does")
    if os.path.lexists(path):
        raise OutputError(f"{path} exists already; remove it, or choose another name")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path.absolute().parent} does not exist; create it, or choose another place")


def write_picture(path: Path, found: ModelDiff | AdapterDiff) -> None:
    """Write the relative change by layer and role. Raises OutputError if there is none to show."""
    cells = found.cells()
    if not cells:
        raise OutputError(f"{path} was not written: no layers and roles are known of what was compared")
    roles = list(dict.fromkeys(role for _, role in cells))
    layers = sorted({layer for layer, _ in cells})
    title = f"relative change from {Path(found.first).name} to {Path(found.second).name}"
    staged = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        staged.write_text(heatmap(title, roles, layers, cells), encoding="utf-8", errors="backslashreplace")
        rename_to_free_name(staged, path)
    except FileExistsError as error:
        raise OutputError(f"{path} appeared in the meantime and is not overwritten; move it away") from error
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; choose another place") from error
    finally:
        staged.unlink(missing_ok=True)
