"""A checkpoint whose quantised weights are shown as float tensors, without their companions."""

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from svdconvert.checkpoint.tensors import (
    OnChunk,
    TensorInfo,
    TensorSource,
    blocks_of_rows,
    in_chunks,
    read_whole,
    tensor_bytes,
    torch_dtype,
)
from svdconvert.errors import CheckpointError
from svdconvert.quantization.base import FORMATS, Coded, Parts, StorageFormat

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

    def chunks(self, name: str, size: int, buffer: memoryview | None = None) -> Iterator[memoryview]:
        """The tensor's bytes in chunks of at most `size`; see TensorSource."""
        if name not in self.coded:
            yield from self.stored.chunks(name, size, buffer)
            return
        end = 0
        for block in self.float32_blocks(name):
            data = tensor_bytes(self.rounded(name, block))
            part = None if buffer is None else buffer[end : end + len(data)]
            yield from in_chunks(data, size, part)
            end += len(data)

    def only(self, names: Collection[str]) -> "DecodedSource":
        """The same checkpoint with only these weights decoded, the others as they are in the files."""
        chosen = {name: found for name, found in self.coded.items() if name in names}
        return DecodedSource(self.stored, chosen, self._dtype)

    def float32_blocks(
        self, name: str, step: int | None = None, parts: Parts | None = None
    ) -> Iterator["Tensor"]:
        """The rows of a decoded tensor in float32, `step` of them at a time, in newly allocated memory.

        `parts` replace the stored ones.
        """
        plugin, coded = self.coded[name]
        parts = parts or self.parts(name)
        rows = coded.shape[0]
        step = step or max(1, _VALUES_AT_ONCE // max(1, coded.count // max(1, rows)))
        for start in range(0, rows, step):
            yield plugin.decode(coded, parts, slice(start, min(start + step, rows)))

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


def is_decoded(source: TensorSource, name: str) -> bool:
    """True for a tensor that is stored as codes."""
    return isinstance(source, DecodedSource) and name in source.coded


def computed_nbytes(source: TensorSource, name: str) -> int:
    """The size in bytes of what `read_to_compute` returns."""
    if isinstance(source, DecodedSource) and name in source.coded:
        return 4 * source.coded[name][1].count
    return source.infos[name].nbytes


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

    if not isinstance(source, DecodedSource) or name not in source.coded:
        return read_whole(source, name, buffer, on_chunk, size)
    nbytes = computed_nbytes(source, name)
    raw = torch.empty(nbytes, dtype=torch.uint8) if buffer is None else buffer[:nbytes]
    whole = raw.view(torch.float32).reshape(source.infos[name].shape)
    start = 0
    for block in source.float32_blocks(name):
        whole[start : start + len(block)] = block
        start += len(block)
        if on_chunk is not None:
            data = tensor_bytes(source.rounded(name, block))
            for chunk in in_chunks(data, size or max(1, len(data))):
                on_chunk(chunk)
    return whole


def rows_to_compute(source: TensorSource, name: str, rows: int) -> Iterator["Tensor"]:
    """As `blocks_of_rows`, but a quantised weight is in float32, as `read_to_compute` returns it."""
    if isinstance(source, DecodedSource) and name in source.coded:
        return source.float32_blocks(name, rows)
    return blocks_of_rows(source, name, rows)
