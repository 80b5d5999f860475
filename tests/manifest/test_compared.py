"""Weights are compared with their manifest while they are read, in whichever order, and not read twice."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svdconvert import Run, merge
from svdconvert.checkpoint.parts import PartsSource
from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.checkpoint.tensors import TensorSource, blocks_of_rows, read_rows
from svdconvert.errors import ArtifactError
from svdconvert.manifest.compared import ComparedSource, sidecar_remarks
from svdconvert.manifest.fingerprint import tensor_checksum
from svdconvert.quantization.view import read_to_compute
from tests.conftest import Build

SHAPES = {"a": (6, 5), "stack": (4, 3, 2), "empty": (0, 3), "scalar": ()}


class Counted:
    """A source that counts the bytes that are read."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.infos = source.infos
        self.read_bytes = 0

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(name)

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        for chunk in self._source.chunks(name, size, buffer, section):
            self.read_bytes += len(chunk)
            yield chunk

    def file_versions(self) -> dict[str, list[int]]:
        return dict(self._source.file_versions())


@pytest.fixture
def stored(tmp_path: Path) -> Counted:
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return Counted(open_checkpoint(tmp_path))


def listing(source: TensorSource, *, by_parts: bool = False) -> dict[str, str]:
    """Name -> checksum; of the stack or, `by_parts`, of its matrices."""
    if by_parts:
        source = PartsSource(source, [f"stack[{index}]" for index in range(4)])
    return {name: tensor_checksum(source, name) for name in source.infos}


def compare(source: TensorSource, known: dict[str, str]) -> ComparedSource:
    return ComparedSource(source, {Path("d/model.safetensors"): known}, Path("d"), "restore the file")


def rows_one_by_one(source: TensorSource, name: str, rows: Iterable[int]) -> None:
    for row in rows:
        read_rows(source, name, slice(row, row + 1))


def in_threads(source: TensorSource, name: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: rows_one_by_one(source, name, [row]), range(4)))
    rows_one_by_one(source, name, range(4, source.infos[name].shape[0]))


def a_look_first(source: TensorSource, name: str) -> None:
    rows_one_by_one(source, name, [0, 1, 0])
    source.read(name)


def by_part(source: TensorSource, name: str) -> None:
    names = [f"{name}[{row}:{row + 1}]" for row in range(source.infos[name].shape[0])]
    for part in names:
        read_to_compute(PartsSource(source, names), part)


IN_ORDER: dict[str, Callable[[TensorSource, str], object]] = {
    "whole": lambda source, name: source.read(name),
    "chunks": lambda source, name: list(source.chunks(name, 7)),
    "rows": lambda source, name: list(blocks_of_rows(source, name, 2)),
    "row by row": lambda source, name: rows_one_by_one(source, name, range(source.infos[name].shape[0])),
    "by part": by_part,
}
WAYS = IN_ORDER | {
    "backwards": lambda source, name: rows_one_by_one(
        source, name, reversed(range(source.infos[name].shape[0]))
    ),
    "a look first": a_look_first,
    "threads": in_threads,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["a", "stack"])
@pytest.mark.parametrize("by_parts", [False, True], ids=["whole", "by parts"])
def test_a_changed_tensor_is_refused_whichever_way_it_is_read(
    stored: Counted, name: str, way: str, by_parts: bool
) -> None:
    known = listing(stored, by_parts=by_parts)
    WAYS[way](compare(stored, known), name)
    for changed in [one for one in known if one.startswith(name)]:
        source = compare(stored, {**known, changed: "0" * 16})
        with pytest.raises(ArtifactError, match=r"model.safetensors: .* is not the tensor that d/svdconvert"):
            WAYS[way](source, name)
        with pytest.raises(ArtifactError):
            WAYS[way](source, name)


@pytest.mark.parametrize("way", IN_ORDER)
@pytest.mark.parametrize("by_parts", [False, True], ids=["whole", "by parts"])
def test_in_order_nothing_is_read_twice(stored: Counted, way: str, by_parts: bool) -> None:
    source = compare(stored, listing(stored, by_parts=by_parts))
    stored.read_bytes = 0
    WAYS[way](source, "stack")
    assert stored.read_bytes == stored.infos["stack"].nbytes


def test_the_rest_is_read_once(stored: Counted) -> None:
    source = compare(stored, listing(stored))
    source.read("a")
    stored.read_bytes = 0
    source.require_all()
    source.require_all()
    assert stored.read_bytes == sum(info.nbytes for name, info in stored.infos.items() if name != "a")
    with pytest.raises(ArtifactError, match="stack is not the tensor"):
        compare(stored, {**listing(stored), "stack": "0" * 16}).require_all()


def test_other_tensors_than_the_listed_ones_are_refused_before_work(stored: Counted) -> None:
    known = listing(stored)
    with pytest.raises(ArtifactError, match=r"d holds scalar, which d/svdconvert\.json does not list"):
        compare(stored, {name: mark for name, mark in known.items() if name != "scalar"})
    with pytest.raises(ArtifactError, match=r"safetensors does not have b, which d/svdconvert\.json lists"):
        compare(stored, {**known, "b": "0" * 16})


def test_an_edited_configuration_is_named_and_used(
    checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    shutil.copytree(decomposed(checkpoint("llama"), rank=2), made)
    assert list(sidecar_remarks([made, made / "config.json", tmp_path])) == []
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    (made / "README.md").write_text("mine")
    said: list[str] = []
    merge(made, tmp_path / "out", run=Run(notify=said.append))
    assert any(one.startswith(f"config.json of {made}: changed after svdconvert wrote") for one in said)
