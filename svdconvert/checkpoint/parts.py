"""Parts of tensors as tensors of their own: one expert of a stacked tensor, or some rows of a matrix.

`NAME[3]` is index 3 of the first axis of the tensor NAME, and `NAME[0:64]` are its indices 0 to 63. A part is
a run of consecutive bytes, so it is read, written and compared without the rest of its tensor.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from svdconvert.checkpoint.tensors import TensorInfo, TensorSource, read_whole
from svdconvert.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_PART = re.compile(r"(?P<whole>.+)\[(?P<first>[0-9]{1,9})(?::(?P<end>[0-9]{1,9}))?\]")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a tensor."""

    whole: str
    """The name of the tensor."""
    begin: int
    """Offset of the part's first byte in the tensor's data."""
    info: TensorInfo
    """The part itself; its name is `NAME[3]` or `NAME[0:64]`."""

    @property
    def section(self) -> slice:
        """The bytes of the part, counted from the tensor's first one."""
        return slice(self.begin, self.begin + self.info.nbytes)


def part_name(whole: str, first: int, end: int | None = None) -> str:
    """The name of one index, or of the indices from `first` to before `end`, of a tensor's first axis."""
    return f"{whole}[{first}]" if end is None else f"{whole}[{first}:{end}]"


def whole_name(name: str) -> str:
    """The name of the tensor that a part belongs to; `name` itself if it is not that of a part."""
    match = _PART.fullmatch(name)
    return match["whole"] if match else name


def index_of(name: str) -> int | None:
    """The index of a part with a single one, such as 3 of `NAME[3]`; None for other names."""
    match = _PART.fullmatch(name)
    return int(match["first"]) if match and match["end"] is None else None


def find_part(infos: Mapping[str, TensorInfo], name: str) -> Part | None:
    """The part called `name` of one of the tensors `infos`; None if there is none, or if it is a tensor."""
    match = None if name in infos else _PART.fullmatch(name)
    if match is None or match["whole"] not in infos:
        return None
    whole = infos[match["whole"]]
    first = int(match["first"])
    end = first + 1 if match["end"] is None else int(match["end"])
    if len(whole.shape) < 2 or not first < end <= whole.shape[0]:  # noqa: PLR2004 (a matrix or a stack)
        return None
    rest = whole.shape[1:]
    shape = rest if match["end"] is None else (end - first, *rest)
    unit = replace(whole, shape=rest).nbytes
    return Part(whole.name, first * unit, TensorInfo(name, shape, whole.dtype))


class PartsSource:
    """A TensorSource that shows some tensors of another source as their parts."""

    def __init__(self, source: TensorSource, names: Iterable[str], *, complete: bool = True) -> None:
        """Show the parts `names` instead of their tensors.

        A tensor of which parts are missing is an error if `complete`; otherwise it is shown too. Raises
        CheckpointError.
        """
        self.whole = source
        """The source with undivided tensors."""
        self._parts: dict[str, Part] = {}
        by_whole: dict[str, list[Part]] = {}
        for name in names:
            if part := find_part(source.infos, name):
                self._parts[name] = part
                by_whole.setdefault(part.whole, []).append(part)
        infos: dict[str, TensorInfo] = {}
        for name, info in source.infos.items():
            if name not in by_whole:
                infos[name] = info
                continue
            parts = sorted(by_whole[name], key=lambda part: part.begin)
            if not _is_complete(info, parts):
                if complete:
                    raise CheckpointError(
                        f"{name} {info.shape} is not what its layout divides it into; give another --layout"
                    )
                infos[name] = info
            infos |= {part.info.name: part.info for part in parts}
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, name: str) -> "Tensor":
        """The tensor or part, in newly allocated memory."""
        return read_whole(self, name) if name in self._parts else self.whole.read(name)

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        """The bytes of a tensor or part in chunks of at most `size`; see TensorSource."""
        if (part := self._parts.get(name)) is None:
            return self.whole.chunks(name, size, buffer, section)
        begin, end, _ = (section or slice(None)).indices(part.info.nbytes)
        return self.whole.chunks(part.whole, size, buffer, slice(part.begin + begin, part.begin + end))

    def file_versions(self) -> Mapping[str, list[int]]:
        """Those of the undivided source."""
        return self.whole.file_versions()


def with_parts(source: TensorSource, names: Iterable[str]) -> TensorSource:
    """The source, with every tensor of which `names` has parts shown as these; other names are ignored.

    Raises CheckpointError if `names` has only some of the parts of a tensor.
    """
    names = [name for name in names if find_part(source.infos, name)]
    return PartsSource(source, names) if names else source


def with_known_parts(source: TensorSource, names: Iterable[str]) -> TensorSource:
    """The source with those of `names` that are parts of its tensors, and other tensors as they are."""
    names = [name for name in names if find_part(source.infos, name)]
    return PartsSource(source, names, complete=False) if names else source


def undivided(source: TensorSource) -> TensorSource:
    """The source as its files have it, without the division into parts."""
    return source.whole if isinstance(source, PartsSource) else source


def joined(infos: Iterable[TensorInfo], wholes: Mapping[str, TensorInfo]) -> list[TensorInfo]:
    """Tensors and parts as undivided tensors, in the same order.

    `wholes` has the shapes of the tensors that parts belong to. Raises CheckpointError if the parts of one
    differ in their element type.
    """
    found: dict[str, TensorInfo] = {}
    for info in infos:
        name = info.name if info.name in wholes else whole_name(info.name)
        is_part = name != info.name and name in wholes
        whole = replace(wholes[name], dtype=info.dtype) if is_part else info
        if found.setdefault(whole.name, whole).dtype != info.dtype:
            raise CheckpointError(
                f"{whole.name} is one tensor, and its parts cannot be stored as {found[whole.name].dtype} "
                f"and {info.dtype}; choose all of them, or none"
            )
    return list(found.values())


def _is_complete(whole: TensorInfo, parts: Iterable[Part]) -> bool:
    end = 0
    for part in parts:
        if part.begin != end:
            return False
        end += part.info.nbytes
    return end == whole.nbytes
