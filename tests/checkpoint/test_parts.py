"""Parts of tensors: one expert of a stacked tensor, or some rows of a matrix."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from svdconvert.checkpoint.parts import (
    find_part,
    index_of,
    joined,
    part_name,
    undivided,
    whole_name,
    with_known_parts,
    with_parts,
)
from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource, read_rows
from svdconvert.errors import CheckpointError

STACK = torch.arange(2 * 3 * 5, dtype=torch.float32).reshape(2, 3, 5)
MATRIX = torch.arange(6 * 4, dtype=torch.bfloat16).reshape(6, 4)
TENSORS = {"a": torch.ones(3), "m": MATRIX, "s": STACK}
PARTS = {"s[0]": STACK[0], "s[1]": STACK[1], "m[0:2]": MATRIX[:2], "m[2:6]": MATRIX[2:]}


@pytest.fixture(params=["safetensors", "pickled", "pickled and transposed"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> TensorSource:
    if request.param == "safetensors":
        save_file(TENSORS, tmp_path / "model.safetensors")
    else:
        stored = dict(TENSORS)
        if "transposed" in request.param:
            stored |= {
                "m": MATRIX.T.contiguous().T,
                "s": STACK.permute(2, 0, 1).contiguous().permute(1, 2, 0),
            }
        torch.save(stored, tmp_path / "pytorch_model.bin")
    return open_checkpoint(tmp_path)


def of_bytes(source: TensorSource, name: str, size: int, like: Tensor) -> Tensor:
    data = b"".join(bytes(chunk) for chunk in source.chunks(name, size))
    return torch.frombuffer(bytearray(data), dtype=like.dtype).reshape(like.shape)


@pytest.mark.parametrize("size", [3, 8, 1000])
def test_parts_have_the_values_and_places_of_their_tensors(source: TensorSource, size: int) -> None:
    divided = with_parts(source, PARTS)
    assert set(divided.infos) == {"a", *PARTS}
    for name, part in PARTS.items():
        assert divided.infos[name] == TensorInfo(
            name, tuple(part.shape), source.infos[whole_name(name)].dtype
        )
        assert torch.equal(divided.read(name), part)
        assert torch.equal(of_bytes(divided, name, size, part), part)
        assert torch.equal(read_rows(divided, name, slice(1, 2)), part[1:2])
    assert torch.equal(divided.read("a"), TENSORS["a"])
    assert undivided(divided) is source and undivided(source) is source
    assert divided.file_versions() == source.file_versions()


def test_parts_follow_one_another_in_the_place_of_their_tensor(source: TensorSource) -> None:
    order = list(with_parts(source, reversed(PARTS)).infos)
    assert order.index("s[1]") == order.index("s[0]") + 1
    assert order.index("m[2:6]") == order.index("m[0:2]") + 1


def test_a_source_without_such_tensors_stays_as_it_is(source: TensorSource) -> None:
    assert with_parts(source, ["t[0]", "a", "a[0]", "s[2]", "m[4:9]"]) is source


@pytest.mark.parametrize("names", [["s[0]"], ["m[0:2]", "m[3:6]"], ["m[0:4]", "m[2:6]"]])
def test_some_of_the_parts_are_not_enough(source: TensorSource, names: list[str]) -> None:
    with pytest.raises(CheckpointError, match="is not what its layout divides it into"):
        with_parts(source, names)


def test_known_parts_of_a_tensor_are_shown_next_to_it(source: TensorSource) -> None:
    shown = with_known_parts(source, ["s[1]", "m[0:2]", "m[2:6]", "a"])
    assert set(shown.infos) == {"a", "m[0:2]", "m[2:6]", "s", "s[1]"}
    assert torch.equal(shown.read("s[1]"), STACK[1]) and torch.equal(shown.read("s"), STACK)


def test_a_tensor_that_is_called_like_a_part_is_none(tmp_path: Path) -> None:
    save_file({"s": STACK, "s[0]": torch.ones(2)}, tmp_path / "model.safetensors")
    infos = open_checkpoint(tmp_path).infos
    assert find_part(infos, "s[0]") is None and find_part(infos, "s[1]") is not None


def test_names_of_parts() -> None:
    assert part_name("x.y", 3) == "x.y[3]" and part_name("x", 0, 64) == "x[0:64]"
    assert [whole_name(name) for name in ("x.y[3]", "x[0:64]", "x", "x[a]")] == ["x.y", "x", "x", "x[a]"]
    assert [index_of(name) for name in ("x[3]", "x[0:64]", "x")] == [3, None, None]


def test_parts_of_one_tensor_must_have_one_element_type(source: TensorSource) -> None:
    infos = list(with_parts(source, PARTS).infos.values())
    assert {info.name for info in joined(infos, source.infos)} == {"a", "m", "s"}
    other = [TensorInfo("s[0]", (3, 5), "BF16"), TensorInfo("s[1]", (3, 5), "F32")]
    with pytest.raises(
        CheckpointError, match="s is one tensor, and its parts cannot be stored as BF16 and F32"
    ):
        joined(other, source.infos)
