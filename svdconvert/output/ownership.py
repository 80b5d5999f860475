"""Whose a directory is: nothing that svdconvert did not write is overwritten, emptied or removed.

An output directory is ours if its manifest can be read, and a file in it if the manifest lists it. A staging
directory is ours if its journal begins with a line of ours, or if its manifest lists all its files.

The results of evaluations, in the subdirectory of that name, are kept when a directory is replaced: they say
which model they belong to.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from svdconvert.checkpoint.json_text import read_json
from svdconvert.errors import OutputError
from svdconvert.output.journal import is_own_journal
from svdconvert.output.rename import rename_to_free_name

MANIFEST_NAME = "svdconvert.json"
EVALUATIONS = "evaluations"
JOURNAL = "journal.jsonl"
# What directories of manifest format 1 hold in addition to their tensors; later formats list it.
_FORMAT1_ENDINGS = (".json", ".jsonl", ".jinja", ".model", ".txt", ".py", ".pt")


def staging_directory(out: Path) -> Path:
    """The staging directory of `out`. Raises OutputError if `out` is / or ends in `..`."""
    if out.name in ("", ".."):
        raise OutputError(f"{out} is not a directory that can be created; choose another -o")
    return out.with_name(out.name + ".partial")


def check_apart(out: Path, *inputs: Path | None) -> None:
    """Raise OutputError if `out` is one of the `inputs`, contains one or is inside one."""
    target = out.resolve()
    for source in (path.resolve() for path in inputs if path is not None):
        if target == source or target in source.parents or source in target.parents:
            raise OutputError(f"{out} overlaps {source}, which is an input; choose another -o")


def check_free(out: Path, *, overwrite: bool, given: Iterable[str | Path | None] = ()) -> None:
    """Raise OutputError unless `out` does not exist, is an empty directory, or may be overwritten.

    With `overwrite`, a directory all of whose files svdconvert wrote may be replaced, and no other, and not
    if one of the locations that the user has `given` is in it, read or not. The staging directory must be
    absent, empty, or left by svdconvert.
    """
    refuse_inputs(out, given)
    _check_staging(staging_directory(out))
    if not os.path.lexists(out):
        return
    if out.is_symlink():
        raise OutputError(f"{out} is a symbolic link; choose another -o, or give the directory itself")
    if not out.is_dir():
        raise OutputError(f"{out} exists and is not a directory; choose another -o")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{out} exists and is not empty; choose another -o, or --overwrite to replace it")
    if foreign := next(foreign_files(out), None):
        raise OutputError(
            f"{out} holds {foreign}, which svdconvert did not write and does not overwrite; move it away, or "
            "choose another -o"
        )


def refuse_inputs(out: Path, given: Iterable[str | Path | None]) -> None:
    """Raise OutputError if one of the locations that the user has `given` is `out`, or in it."""
    target = out.resolve()
    for place in given:
        known = place is not None and _local(place)
        if known and (target == known or target in known.parents):
            raise OutputError(f"{out} holds {place}, which is an input; choose another -o")


def _local(place: str | Path) -> Path | None:
    """The path of an input, without links; None for what is not on this disk, such as a model of the Hub."""
    with suppress(OSError, ValueError):  # too long for a name, or with a zero byte
        return Path(place).resolve() if os.path.lexists(place) else None
    return None


def foreign_files(directory: Path) -> Iterator[Path]:
    """The paths below a directory, relative to it, that svdconvert did not write."""
    own = _own_files(directory)
    for path in sorted(directory.rglob("*")):
        place = path.relative_to(directory)
        if _is_kept(place, directory):
            continue
        if path.is_symlink() or not path.is_dir():
            if place.as_posix() not in own:
                yield place
        elif not any(path.iterdir()):
            yield place


def _is_kept(place: Path, directory: Path) -> bool:
    """True for the directory of evaluations, and for what is in it."""
    return place.parts[0] == EVALUATIONS and not (directory / EVALUATIONS).is_symlink()


def install(staged: Path, out: Path) -> None:
    """Give the complete directory `staged` the name `out`, which `check_free` has allowed.

    An existing `out` is moved aside first and removed afterwards, its own files only, together with what
    killed runs left aside; its evaluations are moved to the new one. Raises OutputError if something
    appeared at `out` in the meantime; `staged` then stays as it is.
    """
    aside = None
    if out.is_dir() and not out.is_symlink():
        if any(out.iterdir()):
            aside = _free_name(out)
            rename_to_free_name(out, aside)
        else:
            out.rmdir()
    try:
        rename_to_free_name(staged, out)
    except OSError as error:
        if aside is not None and not os.path.lexists(out):
            rename_to_free_name(aside, out)
        if not isinstance(error, FileExistsError):
            raise
        raise OutputError(
            f"{out} appeared while this run was writing and is not overwritten; move it away and repeat the "
            "command, which only has to finish"
        ) from error
    with suppress(OSError):  # `out` is complete; what stays is removed by the next run that replaces it
        for path in sorted(_moved_aside(out), key=lambda path: path.name != (aside and aside.name)):
            _keep_evaluations(path, out)
            _remove_own_files(path)


def sync_directory(directory: Path) -> None:
    """Put the entries of a directory on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Put every file below a directory, and the directories themselves, on the disk."""
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        elif path.is_dir():
            sync_directory(path)
    sync_directory(directory)


def _check_staging(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise OutputError(
            f"{path} exists and is no directory of svdconvert; move it away, or choose another -o"
        )
    # A kill between the last two steps, removing the journal and renaming, leaves a complete directory.
    if not is_own_journal(path / JOURNAL) and next(foreign_files(path), None) is not None:
        raise OutputError(
            f"{path} was not left by svdconvert, and this command needs that name; move it away, or choose "
            "another -o"
        )


def _own_files(directory: Path) -> set[str]:
    """The files that a directory's manifest lists, and the manifest; none if there is no valid manifest."""
    try:
        values = read_json(directory / MANIFEST_NAME)
        files = set(map(str, values["files"]))
        listed = values.get("sidecars")
        known = set(map(str, listed)) if isinstance(listed, dict) else _format1_files(directory, values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {MANIFEST_NAME, *files, *known}


def _format1_files(directory: Path, values: Any) -> set[str]:
    if values.get("format") != 1 or not values.get("kind"):
        return set()
    named = (path for path in directory.rglob("*") if path.name.endswith(_FORMAT1_ENDINGS))
    licences = (path for path in directory.iterdir() if path.name.startswith(("LICENSE", "NOTICE")))
    return {path.relative_to(directory).as_posix() for path in (*named, *licences)}


def _aside_prefix(out: Path) -> str:
    return f".{out.name}.replaced-"


def _moved_aside(out: Path) -> list[Path]:
    """The directories that this run and killed ones have moved aside from `out`."""
    prefix = _aside_prefix(out)
    paths = [path for path in out.absolute().parent.iterdir() if path.name.startswith(prefix)]
    return sorted(path for path in paths if path.is_dir() and not path.is_symlink())


def _free_name(out: Path) -> Path:
    """A name next to `out` that nothing has."""
    for number in range(1000):
        aside = out.with_name(f"{_aside_prefix(out)}{os.getpid()}-{number}")
        if not os.path.lexists(aside):
            return aside
    raise OutputError(f"there is no free name next to {out}; clean up {out.parent}")


def _keep_evaluations(aside: Path, out: Path) -> None:
    """Move the evaluations of a directory that was replaced to the new one, unless that has some."""
    kept = aside / EVALUATIONS
    if kept.is_dir() and not kept.is_symlink() and not os.path.lexists(out / EVALUATIONS):
        rename_to_free_name(kept, out / EVALUATIONS)


def _remove_own_files(directory: Path) -> None:
    """Remove a directory that was replaced; what appeared in it in the meantime stays, and so do evaluations.

    The manifest, by which the files are known as ours, is removed last. Raises OSError.
    """
    if next(foreign_files(directory), None) is not None:
        return
    for path in sorted(directory.rglob("*"), reverse=True):
        if _is_kept(path.relative_to(directory), directory):
            continue
        if path.is_dir():
            path.rmdir()
        elif path != directory / MANIFEST_NAME:
            path.unlink()
    (directory / MANIFEST_NAME).unlink(missing_ok=True)
    if not any(directory.iterdir()):
        directory.rmdir()


def clear(directory: Path, *, except_for: str) -> None:
    """Delete everything in a directory but one file."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != except_for:
            path.unlink()
