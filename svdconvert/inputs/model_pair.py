"""Two checkpoints of one model: opened together, and read as their difference."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from torch import Tensor

from svdconvert.checkpoint.parts import whole_name
from svdconvert.checkpoint.tensors import (
    TensorInfo,
    TensorSource,
    blocks_of_rows,
    in_chunks,
    read_whole,
    tensor_bytes,
)
from svdconvert.hub.download import fetch
from svdconvert.hub.equal_files import shared_weights
from svdconvert.inputs.adapted_tensors import is_head, ties_embeddings
from svdconvert.inputs.model import OpenModel, open_plain_model, refuse_adapted
from svdconvert.layouts.base import Layout
from svdconvert.manifest.compared import compared
from svdconvert.manifest.fingerprint import Checksum
from svdconvert.output.sidecars import read_config

_BLOCK = 3 << 17  # elements of both tensors that are subtracted at a time: they stay in the cache


@dataclass(frozen=True)
class ModelPair:
    """Two open checkpoints."""

    base: OpenModel
    tuned: OpenModel
    equal: frozenset[str] = frozenset()
    """Tensors that are known to be equal without reading them."""

    @property
    def models(self) -> tuple[OpenModel, OpenModel]:
        """Both."""
        return self.base, self.tuned

    def identity(self) -> dict[str, Any]:
        """Describes both: an interrupted run continues only if this is unchanged."""
        return {"base": self.base.identity(), "tuned": self.tuned.identity()}

    def divided(self, layout: Layout) -> "ModelPair":
        """Both, with stacked tensors divided into the matrices that have slots."""
        base, tuned = (replace(one, source=layout.divided(one.source)) for one in self.models)
        parts = {name for name in base.source.infos if whole_name(name) in self.equal}
        return ModelPair(base, tuned, self.equal | parts)

    def common(self) -> dict[str, TensorInfo]:
        """The tensors that both have with the same shape, as the base stores them, in its order."""
        tuned = self.tuned.source.infos
        return {
            name: info
            for name, info in self.base.source.infos.items()
            if name in tuned and tuned[name].shape == info.shape
        }

    def mismatches(self) -> dict[str, str]:
        """Tensor -> what is wrong, for those that only one checkpoint has, or whose shapes differ.

        A head that one stores and the other ties to its embeddings is no mismatch.
        """
        base = self.base.source.infos
        tuned = self.tuned.source.infos
        found = {}
        for name in {**base, **tuned}:
            if name in base and name in tuned:
                if base[name].shape != tuned[name].shape:
                    found[name] = (
                        f"{name} has the shape {base[name].shape} in {self.base.path} and "
                        f"{tuned[name].shape} in {self.tuned.path}"
                    )
                continue
            owner, other = (self.base, self.tuned) if name in base else (self.tuned, self.base)
            is_tied = ties_embeddings(owner.config) and ties_embeddings(other.config)
            if not (is_head(name.removesuffix(".weight")) and is_tied):
                found[name] = f"{owner.path} has {name}, and {other.path} does not"
        return found


def open_pair(
    base: str, tuned: str, command: str, *, stream: bool = False, trust_remote_code: bool = False
) -> ModelPair:
    """Open two plain checkpoints for `command`. Raises SvdConvertError as `open_plain_model`.

    Of two models of the Hub, files whose SHA-256 is the same in both are not downloaded. With
    `trust_remote_code`, code of the repository of the base may run, to find its layout.
    """
    pair = _open_pair(base, tuned, command, stream=stream)
    return replace(pair, base=replace(pair.base, trust_remote_code=trust_remote_code))


def _open_pair(base: str, tuned: str, command: str, *, stream: bool) -> ModelPair:
    sidecars = fetch(base, "sidecars"), fetch(tuned, "sidecars")
    for name, snapshot in zip((base, tuned), sidecars, strict=True):
        refuse_adapted(name, snapshot, command)
    shared = shared_weights(*sidecars, stream=stream)
    if shared is None:
        first = open_plain_model(base, command, stream=stream)
        return ModelPair(first, open_plain_model(tuned, command, stream=stream))
    models = [
        OpenModel(snapshot, compared(source, snapshot.path), read_config(snapshot.path), snapshot.path)
        for snapshot, source in zip(sidecars, shared.sources, strict=True)
    ]
    return ModelPair(models[0], models[1], shared.equal)


@dataclass(frozen=True)
class Difference:
    """A TensorSource of tuned - base in float32, for the tensors that both have with the same shape."""

    pair: ModelPair
    checksums: dict[str, str] = field(default_factory=dict)
    """Tensor -> checksum of the base's, for the tensors that have been read."""

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """The common tensors, as float32."""
        return {name: replace(info, dtype="F32") for name, info in self.pair.common().items()}

    def read(self, name: str) -> Tensor:
        """The difference, in newly allocated memory."""
        return read_whole(self, name)

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        """The bytes of the difference; see TensorSource."""
        if section is not None:
            yield from in_chunks(tensor_bytes(self.read(name))[section], size, buffer)
            return
        end = 0
        for before, after in self.blocks(name):
            data = tensor_bytes(after.float().sub(before.float()))
            part = None if buffer is None else buffer[end : end + len(data)]
            yield from in_chunks(data, size, part)
            end += len(data)

    def blocks(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows of the base, the same rows of tuned) in their stored dtypes, until all rows were given.

        A pair is valid only until the next one is requested.
        """
        hasher = Checksum()
        for before, after in _blocks(name, self.pair.base.source, self.pair.tuned.source):
            hasher.update(tensor_bytes(before))
            yield before, after
        self.checksums[name] = hasher.text()

    def file_versions(self) -> Mapping[str, list[int]]:
        """Those of both checkpoints."""
        sides = {"base": self.pair.base.source, "tuned": self.pair.tuned.source}
        return {
            f"{side}: {file}": version
            for side, source in sides.items()
            for file, version in source.file_versions().items()
        }


def _blocks(name: str, base: TensorSource, tuned: TensorSource) -> Iterator[tuple[Tensor, Tensor]]:
    shape = base.infos[name].shape
    if not shape or not prod(shape):
        yield base.read(name), tuned.read(name)
        return
    rows = max(1, min(shape[0], _BLOCK // prod(shape[1:])))
    yield from zip(blocks_of_rows(base, name, rows), blocks_of_rows(tuned, name, rows), strict=True)
