"""Lines of measurements: JSON objects, each with the step of the training run that it belongs to."""

from io import BytesIO
from pathlib import Path
from typing import Any

from svdconvert.checkpoint.json_text import parse_json
from svdconvert.errors import ArtifactError


def read_measurements(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """(line, its values) for all complete lines of a file; a kill may have cut the last one short.

    Raises ArtifactError for a line that is no object with a step.
    """
    found: list[tuple[bytes, dict[str, Any]]] = []
    for number, line in enumerate(BytesIO(path.read_bytes()), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            values = parse_json(line)
        except ValueError:
            values = None
        if not isinstance(values, dict) or type(values.get("step")) is not int:
            raise ArtifactError(f"{path}, line {number} is no measurement; restore the file, or remove it")
        found.append((line, values))
    return found


def last_held_out(path: Path) -> float | None:
    """The newest held-out loss of a file of measurements; None without one. Raises ArtifactError as above."""
    found = losses(path)[1]
    return found[-1] if found else None


def losses(path: Path) -> tuple[list[float], list[float]]:
    """(losses, held-out losses) of a run in the order of its steps. Raises ArtifactError as above."""
    logs = [values for _, values in read_measurements(path)]
    found = [[log[name] for log in logs if name in log] for name in ("loss", "eval_loss")]
    if any(not isinstance(loss, float) for loss in (*found[0], *found[1])):
        raise ArtifactError(f"{path} holds a loss that is no float; restore the file, or remove it")
    return found[0], found[1]
