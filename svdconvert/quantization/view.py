"""A checkpoint whose quantised weights are shown as float tensors, without their companions."""

from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from svdconvert.checkpoint.parts import find_part, part_name, undivided, whole_name, with_parts
from svdconvert.checkpoint.picked import PickedSource
from svdconvert.checkpoint.tensors import (
    OnChunk,
    TensorInfo,
    TensorSource,
    blocks_of_rows,
    in_chunks,
    read_rows,
    read_whole,
    tensor_bytes,
    torch_dtype,
)
from svdconvert.errors import CheckpointError
from svdconvert.quantization.base import FORMATS, Coded, Parts, StorageFormat
from svdconvert.quantization.stacks import one_of_stack

if TYPE_CHECKING:
    from torch import Tensor

_VALUES_AT_ONCE = 1 << 22  # that are decoded at the same time


class DecodedSource:
    """A TensorSource that shows each quantised weight of another one as a tensor of `dtype`.

    Its values are the decoded ones in float32, rounded once. Companions, such as scales, are hidden. A weight
    is decoded block by block of its rows.
    """

    def __init__(
        self, stored: TensorSource, coded: Mapping[str, tuple[StorageFormat, Coded]], dtype: str
    ) -> None:
        """`coded` has the format and the description of every quantised weight, by its name.

        Raises CheckpointError if the checkpoint also holds an unquantised tensor of that name.
        """
        self.stored = stored
        """The checkpoint as it is in the files."""
        self.coded = coded
        self._dtype = dtype
        self.infos: Mapping[str, TensorInfo] = self._shown()

    def _shown(self) -> dict[str, TensorInfo]:
        """The decoded tensors in the place of the first tensor that they replace."""
        owner = {part: name for name, (_, coded) in self.coded.items() for part in coded.stored}
        found: dict[str, TensorInfo] = {}
        for part, info in self.stored.infos.items():
            name = owner.get(part)
            if name is None and part in self.coded:
                raise CheckpointError(
                    f"{part} is stored twice, also as {self.coded[part][1].parts['codes']}; fetch the "
                    "checkpoint again"
                )
            if name is None:
                found[part] = info
            elif name not in found:
                found[name] = TensorInfo(name, self.coded[name][1].shape, self._dtype)
        return found

    def read(self, name: str) -> "Tensor":
        """The tensor in the element type of `infos`, in newly allocated memory."""
        return read_whole(self, name)

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        """The tensor's bytes in chunks of at most `size`; see TensorSource."""
        if name not in self.coded:
            yield from self.stored.chunks(name, size, buffer, section)
            return
        info = self.infos[name]
        first, last, _ = (section or slice(None)).indices(info.nbytes)
        per_row = max(1, info.nbytes // max(1, info.shape[0]))
        rows = slice(first // per_row, -(-last // per_row))
        skipped = first - rows.start * per_row  # a section may begin or end within a row
        left = last - first
        end = 0
        for block in self.float32_blocks(name, rows=rows):
            data = tensor_bytes(self.rounded(name, block))[skipped:][:left]
            skipped = 0  # it is less than a row
            part = None if buffer is None else buffer[end : end + len(data)]
            yield from in_chunks(data, size, part)
            end += len(data)
            left -= len(data)

    def only(self, names: Collection[str]) -> "DecodedSource":
        """The same checkpoint with only these weights decoded, the others as they are in the files.

        A name may be that of one matrix of a stack. The stored tensors of that stack are then shown as parts.
        """
        chosen = {name: found for name, found in self.coded.items() if name in names}
        single = {name: found for name in names if (found := one_of_stack(self.coded, name))}
        stacks = [self.coded[whole] for whole in dict.fromkeys(whole_name(name) for name in single)]
        pieces = [
            part_name(stored, index)
            for _, stack in stacks
            for stored in stack.parts.values()
            for index in range(stack.shape[0])
        ]
        return DecodedSource(with_parts(self.stored, pieces), {**chosen, **single}, self._dtype)

    def float32_blocks(
        self, name: str, step: int | None = None, parts: Parts | None = None, rows: slice | None = None
    ) -> Iterator["Tensor"]:
        """The rows of a decoded tensor in float32, `step` of them at a time, in newly allocated memory.

        `parts` replace the stored ones; `rows` (start and stop) are some of the rows.
        """
        plugin, coded = self.coded[name]
        start, stop, _ = (rows or slice(None)).indices(coded.shape[0])
        step = step or max(1, _VALUES_AT_ONCE // max(1, coded.count // max(1, coded.shape[0])))
        if coded.by_rows and parts is None:
            for first in range(start, stop, step):
                last = min(first + step, stop)
                yield plugin.decode(coded, self._rows_of_parts(name, first, last), slice(0, last - first))
            return
        parts = parts or self.parts(name)
        for first in range(start, stop, step):
            yield plugin.decode(coded, parts, slice(first, min(first + step, stop)))

    def _rows_of_parts(self, name: str, first: int, last: int) -> Parts:
        """The stored tensors of some rows of a weight whose parts all have its first dimension."""
        stored = self.coded[name][1].parts
        return {part: read_rows(self.stored, name, slice(first, last)) for part, name in stored.items()}

    def rounded(self, name: str, block: "Tensor") -> "Tensor":
        """Decoded values in the element type of `infos`.

        Raises CheckpointError if a finite value does not fit into it.
        """
        import torch

        rounded = block.to(torch_dtype(self._dtype))
        if self._dtype == "F16" and not torch.equal(rounded.isfinite(), block.isfinite()):
            raise CheckpointError(
                f"{name} decodes to values up to {float(block.abs().max()):.3g}, too large for float16; "
                'write "bfloat16" as the dtype of its config.json'
            )
        return rounded

    def parts(self, name: str) -> Parts:
        """The stored tensors of a quantised weight, whichever files they are in."""
        return {part: self.stored.read(stored) for part, stored in self.coded[name][1].parts.items()}

    def file_versions(self) -> Mapping[str, list[int]]:
        """Those of the stored checkpoint."""
        return self.stored.file_versions()


def detect_formats(
    source: TensorSource, settings: Mapping[str, Any]
) -> dict[str, tuple[StorageFormat, Coded]]:
    """The format and the description of every quantised weight of a checkpoint.

    `settings` is its quantization_config. If that names a method, only formats of that method are looked for.
    Raises CheckpointError if two formats claim one tensor, or if a weight and its companions contradict each
    other.
    """
    method = settings.get("quant_method")
    loaded, _ = FORMATS.load_all()
    found: dict[str, tuple[StorageFormat, Coded]] = {}
    for plugin in loaded.values():
        if method is not None and not (isinstance(method, str) and method in plugin.methods):
            continue
        for coded in plugin.detect(source, settings):
            if coded.name in found:
                raise CheckpointError(
                    f"{coded.name} is stored in two formats, as {found[coded.name][0].title(coded)} and as "
                    f"{plugin.title(coded)}; fetch the checkpoint again"
                )
            found[coded.name] = (plugin, coded)
    return found


def _find(source: TensorSource, name: str) -> tuple[DecodedSource, str, slice] | None:
    """(view, quantised weight, rows) of a tensor or part that is stored as codes; None for all others."""
    if isinstance(source, PickedSource):
        return _find(*source.origin(name))
    view = undivided(source)
    if not isinstance(view, DecodedSource):
        return None
    if name in view.coded:
        return view, name, slice(0, view.infos[name].shape[0])
    part = find_part(view.infos, name)
    if part is None or part.whole not in view.coded:
        return None
    whole = view.infos[part.whole]
    per_row = max(1, whole.nbytes // whole.shape[0])
    first = part.begin // per_row
    return view, part.whole, slice(first, first + part.info.nbytes // per_row)


def is_decoded(source: TensorSource, name: str) -> bool:
    """True for a tensor, or a part of one, that is stored as codes."""
    return _find(source, name) is not None


def computed_nbytes(source: TensorSource, name: str) -> int:
    """The size in bytes of what `read_to_compute` returns."""
    info = source.infos[name]
    return 4 * prod(info.shape) if is_decoded(source, name) else info.nbytes


def read_to_compute(
    source: TensorSource,
    name: str,
    buffer: "Tensor | None" = None,
    on_chunk: OnChunk | None = None,
    size: int | None = None,
) -> "Tensor":
    """As `read_whole`, but a quantised weight is in float32, not rounded to the element type of `infos`.

    `on_chunk` is called with the bytes of the rounded values, which are those of `chunks`, so that a checksum
    does not depend on how the tensor is read.
    """
    import torch

    found = _find(source, name)
    if found is None:
        return read_whole(source, name, buffer, on_chunk, size)
    view, weight, rows = found
    nbytes = computed_nbytes(source, name)
    raw = torch.empty(nbytes, dtype=torch.uint8) if buffer is None else buffer[:nbytes]
    whole = raw.view(torch.float32).reshape(rows.stop - rows.start, *view.infos[weight].shape[1:])
    start = 0
    for block in view.float32_blocks(weight, rows=rows):
        whole[start : start + len(block)] = block
        start += len(block)
        if on_chunk is not None:
            data = tensor_bytes(view.rounded(weight, block))
            for chunk in in_chunks(data, size or max(1, len(data))):
                on_chunk(chunk)
    return whole.reshape(source.infos[name].shape)


def rows_to_compute(source: TensorSource, name: str, rows: int) -> Iterator["Tensor"]:
    """As `blocks_of_rows`, but a quantised weight is in float32, as `read_to_compute` returns it."""
    found = _find(source, name)
    if found is None:
        return blocks_of_rows(source, name, rows)
    view, weight, own = found
    if len(source.infos[name].shape) == len(view.infos[weight].shape):
        return view.float32_blocks(weight, rows, rows=own)
    matrix = read_to_compute(source, name)  # of a stack
    return (matrix[start : start + rows] for start in range(0, len(matrix), rows))
