"""run.json: which recipe a directory of `run` belongs to. It is written before the first step."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from svdconvert.config.experiment import (
    BASE,
    FOLDERS,
    PICTURE,
    RECORD,
    RESULTS,
    names_a_directory,
)
from svdconvert.errors import OutputError, SvdConvertError
from svdconvert.manifest.evaluations import FOLDER, read_evaluation
from svdconvert.output.journal import is_own_journal, require_same_run
from svdconvert.output.ownership import check_free, staging_directory, sync_directory
from svdconvert.output.sidecars import read_json_object
from svdconvert.output.staging import os_errors_as_output_error
from svdconvert.version import __version__

_FORMAT = 1


def begin(out: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make `out` the directory of this recipe, or continue in it.

    With `overwrite`, what another run left there is removed. Raises OutputError if `out` holds something
    else, or belongs to another recipe, with what differs.
    """
    record = {"format": _FORMAT, "svdconvert": __version__, **identity}
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out} is no directory; choose another -o")
    if (out / RECORD).is_file():
        before = _read(out / RECORD)
        if not overwrite:
            require_same_run(before, json.loads(json.dumps(record)), out)
            return
        _remove(out, before.get("runs"))
    elif out.exists() and any(out.iterdir()):
        raise OutputError(f"{out} holds other files and no {RECORD}; choose another -o")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be created: {error.strerror}; choose another -o") from error
    write(out / RECORD, json.dumps(record, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    """The record. Raises OutputError if it is damaged."""
    found = read_json_object(path)
    if found.get("format") != _FORMAT or not isinstance(found.get("runs", {}), dict):
        raise OutputError(f"{path} was not written by run of this version; move {path.parent} away")
    return found


def _remove(out: Path, runs: Iterable[str] | None) -> None:
    """Remove what the runs wrote. Raises OutputError if a directory holds a file of somebody else."""
    places = [out] if runs is None else [out / name for name in runs if names_a_directory(name)]
    written = [place / folder for place in places for folder in FOLDERS.values()]
    for directory in written:
        check_free(directory, overwrite=True)
        _refuse_foreign_results(directory / FOLDER)
    for directory in written:
        for path in (directory, staging_directory(directory)):
            if path.exists():
                with os_errors_as_output_error(path):
                    shutil.rmtree(path)
    for name in (RESULTS, PICTURE):
        (out / name).unlink(missing_ok=True)


def _refuse_foreign_results(folder: Path) -> None:
    """Raise OutputError for a file among evaluations that `eval` did not write."""
    for path in sorted(folder.rglob("*")):
        if path.parent == folder and not path.is_symlink() and path.is_file() and _is_of_eval(path):
            continue
        raise OutputError(f"{path} was not written by svdconvert and is not removed; move it away")


def _is_of_eval(path: Path) -> bool:
    if path.suffix == ".json":
        with suppress(SvdConvertError):
            return bool(read_evaluation(path))
    result = path.with_suffix(".json")
    return path.suffix == ".jsonl" and (is_own_journal(path) or (result.is_file() and _is_of_eval(result)))


def results_directory(out: Path) -> Path:
    """Where the results of the untouched model are."""
    return out / BASE


def write(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all. Raises OutputError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path} cannot be written: {error.strerror}; make room, and repeat the command"
        ) from error
