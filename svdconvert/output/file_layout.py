"""Where the bytes of each tensor are in a planned file, by the file's format."""

from collections.abc import Mapping
from pathlib import Path

from svdconvert.checkpoint.header import build_header
from svdconvert.output import gguf_file, pth_archive
from svdconvert.output.plan import PlannedFile


def is_laid_out(path: Path, file: PlannedFile) -> bool:
    """True if the file exists with the planned size."""
    if path.suffix == pth_archive.ENDING:
        return pth_archive.is_laid_out(path, file.infos)
    return path.is_file() and path.stat().st_size == size_of(file)


def header_of(file: PlannedFile) -> tuple[bytes, Mapping[str, int]]:
    """The first bytes of a file, and the offset of each tensor in it."""
    if file.path.endswith(gguf_file.ENDING):
        return gguf_file.build_header(file.metadata, file.infos)
    return build_header(file.infos)


def size_of(file: PlannedFile) -> int:
    """The size of a finished file in bytes."""
    if file.path.endswith(gguf_file.ENDING):
        return gguf_file.file_size(file.metadata, file.infos)
    return len(build_header(file.infos)[0]) + file.nbytes
