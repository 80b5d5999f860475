"""PyTorch's .pth file, laid out before the values of its tensors are known.

The format is a zip file without compression: a pickle of names, shapes and storage numbers, and one entry
for the bytes of each storage. torch writes everything but the bytes (`skip_data`), the staged output writes
the bytes of each tensor at their offset, and `seal` fills in the CRC-32 of every entry.
"""

import errno
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from struct import calcsize, pack_into, unpack_from
from zipfile import BadZipFile, ZipFile

from svdconvert.checkpoint.tensors import TensorInfo, torch_dtype

ENDING = ".pth"
_LOCAL = "<4s5H3L2H"  # header of a zip entry, before its name and extra field
_CENTRAL = "<4s6H3L5H2L"  # its entry in the zip directory, before name, extra field and comment
_ENTRY = b"PK\x01\x02"  # signature of an entry of the zip directory
_DESCRIPTOR = b"PK\x07\x08"  # signature of the data descriptor (checksum and sizes) after an entry's bytes

_TORCHS_WRITER = "inline_container"  # the source file that torch's errors about archives name


def lay_out(path: Path, infos: Sequence[TensorInfo]) -> None:
    """Write a .pth file of these tensors in this order, without their bytes."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.serialization import skip_data

    with FakeTensorMode():
        tensors = OrderedDict(
            (info.name, torch.empty(info.shape, dtype=torch_dtype(info.dtype))) for info in infos
        )
    with skip_data(materialize_fake_tensors=True), torch_errors_as_os_error(path):
        torch.save(tensors, path)


@contextmanager
def torch_errors_as_os_error(path: Path) -> Iterator[None]:
    """Raise OSError if torch cannot write an archive, which it reports as a RuntimeError about positions."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from error
        if _TORCHS_WRITER not in str(error):
            raise
        reason = "PyTorch could not write all of it, perhaps because the disk is full"
        raise OSError(errno.EIO, reason, str(path)) from error


def is_laid_out(path: Path, infos: Sequence[TensorInfo]) -> bool:
    """True if `lay_out` wrote the file for these tensors."""
    try:
        offsets(path, infos)
    except (OSError, KeyError, BadZipFile):
        return False
    return True


def offsets(path: Path, infos: Sequence[TensorInfo]) -> dict[str, int]:
    """Tensor -> offset of its first byte in a file that `lay_out` wrote.

    Raises BadZipFile or KeyError if the file was not laid out for these tensors.
    """
    found = {}
    with ZipFile(path) as archive, path.open("rb") as stream:
        for number, info in enumerate(infos):
            entry = archive.getinfo(f"{path.stem}/data/{number}")
            if entry.file_size != info.nbytes:
                raise BadZipFile(f"{info.name}: the entry has {entry.file_size} bytes, not {info.nbytes}")
            stream.seek(entry.header_offset)
            *_, name, extra = unpack_from(_LOCAL, stream.read(calcsize(_LOCAL)))
            found[info.name] = entry.header_offset + calcsize(_LOCAL) + name + extra
    return found


def seal(path: Path, sums: Mapping[str, int], infos: Sequence[TensorInfo]) -> None:
    """Write the CRC-32 of every tensor after its bytes and in the zip directory."""
    begins = offsets(path, infos)
    with ZipFile(path) as archive, path.open("r+b") as stream:
        start = archive.start_dir
        for info in infos:
            end = begins[info.name] + info.nbytes
            stream.seek(end)
            if stream.read(4) == _DESCRIPTOR:
                stream.seek(end + 4)
                stream.write(sums[info.name].to_bytes(4, "little"))
        stream.seek(start)
        entries = {f"{path.stem}/data/{number}": sums[info.name] for number, info in enumerate(infos)}
        directory = _with_checksums(stream.read(), entries)
        stream.seek(start)
        stream.write(directory)


def _with_checksums(directory: bytes, sums: Mapping[str, int]) -> bytes:
    """A zip directory with the CRC-32 of the entries in `sums`."""
    changed = bytearray(directory)
    at = 0
    while changed[at : at + 4] == _ENTRY:
        name, extra, comment = unpack_from("<3H", changed, at + 28)
        first = at + calcsize(_CENTRAL)
        if (entry := changed[first : first + name].decode()) in sums:
            pack_into("<L", changed, at + 16, sums[entry])
        at = first + name + extra + comment
    return bytes(changed)
