"""PyTorch's .pth file, laid out before its tensors are known: torch writes all but their bytes.

The format is a zip file without compression: a pickle of names, shapes and numbers of storages, and one
entry for the bytes of each storage. torch lays it out and leaves the bytes away (`skip_data`); the writer
puts each tensor's bytes into its place; sealing fills in the checksums, which come last in a zip file's
nature.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from struct import calcsize, pack_into, unpack_from
from zipfile import BadZipFile, ZipFile

from svdconvert.checkpoint.tensors import TensorInfo, torch_dtype

ENDING = ".pth"
_LOCAL = "<4s5H3L2H"  # a zip entry's header, before its name and extra field
_CENTRAL = "<4s6H3L5H2L"  # its entry in the directory at the end, before name, extra field and comment
_ENTRY = b"PK\x01\x02"  # begins an entry of that directory
_DESCRIPTOR = b"PK\x07\x08"  # begins what follows an entry's bytes: checksum and sizes


def lay_out(path: Path, infos: Sequence[TensorInfo]) -> None:
    """Write a .pth file of these tensors, in this order, with holes for their bytes."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.serialization import skip_data

    with FakeTensorMode():
        tensors = OrderedDict(
            (info.name, torch.empty(info.shape, dtype=torch_dtype(info.dtype))) for info in infos
        )
    with skip_data(materialize_fake_tensors=True):
        torch.save(tensors, path)


def is_laid_out(path: Path, infos: Sequence[TensorInfo]) -> bool:
    """True where `lay_out` made the file for these tensors."""
    try:
        offsets(path, infos)
    except (OSError, KeyError, BadZipFile):
        return False
    return True


def offsets(path: Path, infos: Sequence[TensorInfo]) -> dict[str, int]:
    """Where the bytes of each tensor begin in a file that `lay_out` made.

    Raises BadZipFile or KeyError where it is not one for these tensors.
    """
    places = {}
    with ZipFile(path) as archive, path.open("rb") as stream:
        for number, info in enumerate(infos):
            entry = archive.getinfo(f"{path.stem}/data/{number}")
            if entry.file_size != info.nbytes:
                raise BadZipFile(f"{info.name}: {entry.file_size} bytes are kept for it")
            stream.seek(entry.header_offset)
            *_, name, extra = unpack_from(_LOCAL, stream.read(calcsize(_LOCAL)))
            places[info.name] = entry.header_offset + calcsize(_LOCAL) + name + extra
    return places


def seal(path: Path, sums: Mapping[str, int], infos: Sequence[TensorInfo]) -> None:
    """Write the CRC-32 of every tensor where a zip file has it: behind the bytes and in the directory."""
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
        directory = _summed(stream.read(), entries)
        stream.seek(start)
        stream.write(directory)


def _summed(directory: bytes, sums: Mapping[str, int]) -> bytes:
    """The directory of a zip file with the checksums of the entries in `sums`."""
    changed, at = bytearray(directory), 0
    while changed[at : at + 4] == _ENTRY:
        name, extra, comment = unpack_from("<3H", changed, at + 28)
        first = at + calcsize(_CENTRAL)
        if (entry := changed[first : first + name].decode()) in sums:
            pack_into("<L", changed, at + 16, sums[entry])
        at = first + name + extra + comment
    return bytes(changed)
