"""Writes the page of a report: whole or not at all, and never over a file of somebody else."""

import os
from contextlib import suppress
from pathlib import Path

from svdconvert.errors import OutputError
from svdconvert.output.ownership import sync_directory
from svdconvert.output.rename import rename_to_free_name
from svdconvert.output.stamp import is_stamped, stamped

ENDINGS = (".html", ".htm")


def check_page(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError if a page cannot be written to `path`, before any work is done."""
    if path.suffix.lower() not in ENDINGS:
        raise OutputError(f"{path} does not end in .html; the report is a page of HTML, so give such a name")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path.absolute().parent} does not exist; create it, or choose another -o")
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file():
        raise OutputError(f"{path} exists and is no file; choose another -o")
    if not overwrite:
        raise OutputError(f"{path} exists; choose another -o, or --overwrite to replace it")
    if not is_stamped(path.read_text(encoding="utf-8", errors="replace")):
        raise OutputError(
            f"{path} is no report of svdconvert, or was edited since, and is not overwritten; move it away, "
            "or choose another -o"
        )


def write_page(path: Path, text: str, *, overwrite: bool) -> None:
    """Write the page with a checksum of itself. Raises OutputError if it cannot be written."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with staged.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(stamped(text.rstrip() + "\n"))
            stream.flush()
            os.fsync(stream.fileno())
        if overwrite and path.exists():
            check_page(path, overwrite=True)
            os.replace(staged, path)
        else:
            rename_to_free_name(staged, path)
        sync_directory(path.absolute().parent)
    except FileExistsError as error:
        raise OutputError(f"{path} appeared in the meantime and is not overwritten; move it away") from error
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; choose another place") from error
    finally:
        with suppress(OSError):
            staged.unlink()
