"""Automatic layouts that were found before, in the user's cache: reading one imports no transformers.

A layout depends on config.json, on the names and shapes of the tensors, on the code that comes with the
model, on the code that finds it, and on the version of transformers. A file that cannot be read or written is
no error: the layout is found anew.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.layouts.automatic import AutomaticLayout, automatic_layout
from svdconvert.layouts.base import Slot
from svdconvert.layouts.experts import Experts
from svdconvert.manifest.place import Place, Rows

_LARGEST = 1 << 26  # bytes of a file
_KEPT = (
    "roles", "experts", "task", "summary", "table", "parameters", "rearranged", "left_out", "assumptions",
    "limits_ranks", "fan_in_fan_out",
)  # fmt: skip
"""The fields of an automatic layout; its model types are kept too."""


def cached_automatic_layout(
    path: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], *, trust_remote_code: bool
) -> AutomaticLayout:
    """The automatic layout of the model in `path`, from the cache if it is there.

    Raises what `automatic_layout` raises.
    """
    file = _folder() / f"{_key(path, config, infos)}.json"
    layout = _read(file)
    if layout is None:
        layout = automatic_layout(path, config, infos, trust_remote_code=trust_remote_code)
        _write(file, layout)
    return layout


def _folder() -> Path:
    """$SVDCONVERT_CACHE, else svdconvert in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("SVDCONVERT_CACHE"):
        return Path(own) / "layouts"
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "svdconvert" / "layouts"


def _key(path: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> str:
    tensors = [[info.name, info.shape] for info in infos.values()]
    code = []
    if "auto_map" in config and path.is_dir():
        code = [[file.name, _digest(file)] for file in sorted(path.glob("*.py"))]
    text = json.dumps([_own_code(), version("transformers"), config, tensors, code], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


@cache
def _own_code() -> list[str]:
    """Checksums of the modules that find a layout."""
    package = Path(__file__).parents[1]
    names = ("layouts/automatic.py", "models/architecture.py", "models/matrices.py", "models/roles.py")
    return [_digest(package / name) for name in names]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _read(file: Path) -> AutomaticLayout | None:
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if file.stat().st_size <= _LARGEST:
            return _layout(json.loads(file.read_bytes()))
    return None


def _write(file: Path, layout: AutomaticLayout) -> None:
    values = asdict(layout)
    kept = {name: values[name] for name in _KEPT} | {"model_types": sorted(layout.model_types)}
    text = json.dumps(kept)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            temporary.write(text)
        os.replace(temporary.name, file)


def _layout(values: dict[str, Any]) -> AutomaticLayout:
    values["model_types"] = frozenset(values["model_types"])
    values["assumptions"] = tuple(values["assumptions"])
    values["table"] = {name: _slot(slot) for name, slot in values["table"].items()}
    if values["experts"] is not None:
        values["experts"]["parameters"] = {
            name: tuple(parts) for name, parts in values["experts"]["parameters"].items()
        }
        values["experts"] = Experts(**values["experts"] | {"renamed": tuple(values["experts"]["renamed"])})
    return AutomaticLayout(**values)


def _slot(values: dict[str, Any]) -> Slot:
    place = values["place"]
    if place is not None:
        place["rows"] = None if place["rows"] is None else Rows(*place["rows"])
        values["place"] = Place(**place | {"projections": tuple(place["projections"])})
    return Slot(**values)
