"""Directories of safetensors files that the library wrote are read, and damaged ones refused."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from svdconvert.checkpoint.safetensors_files import INDEX, SafetensorsSource, open_checkpoint
from svdconvert.checkpoint.tensors import TensorSource, blocks_of_rows, torch_dtype
from svdconvert.errors import CheckpointError, ModelNotFoundError
from tests.tiny import SHARDED

TENSORS = {
    "wide": torch.randn(3, 50),
    "half": torch.randn(7, 5).bfloat16(),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False, True]),
    "tiny float": torch.randn(3, 3).to(torch.float8_e4m3fn),
    "numbers": torch.arange(5),
}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A directory with two shards, "a" in the first and "b" in the second."""
    for number, name in enumerate("ab", 1):
        save_file(
            {name: torch.full((4, 4), float(number))}, tmp_path / f"model-0000{number}-of-00002.safetensors"
        )
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write_index(tmp_path, weight_map)
    return tmp_path


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 128}, "weight_map": weight_map}))


def contents(source: TensorSource, size: int = 7) -> dict[str, bytes]:
    """Every tensor's bytes, by pieces of `size`."""
    return {name: b"".join(bytes(piece) for piece in source.chunks(name, size)) for name in source.infos}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_read_as_the_library_wrote_it(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    source = open_checkpoint(tmp_path)
    tensor = source.read(name)
    assert (tensor.dtype, tensor.shape) == (TENSORS[name].dtype, TENSORS[name].shape)
    assert tensor.flatten().view(torch.uint8).tolist() == TENSORS[name].flatten().view(torch.uint8).tolist()
    assert torch_dtype(source.infos[name].dtype) == TENSORS[name].dtype


@pytest.mark.parametrize("size", [1, 7, 10**6])
def test_pieces_add_up_to_the_tensor_and_are_no_larger_than_asked(tmp_path: Path, size: int) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    source = open_checkpoint(tmp_path)
    assert all(len(piece) <= size for name in source.infos for piece in source.chunks(name, size))
    wanted = {name: bytes(tensor.flatten().view(torch.uint8).tolist()) for name, tensor in TENSORS.items()}
    assert contents(source, size) == wanted


def test_shards_and_one_file_hold_the_same(checkpoint: Callable[..., Path]) -> None:
    one, several = checkpoint("llama"), checkpoint("llama", shard=SHARDED)
    assert len(list(several.glob("*.safetensors"))) > 3
    assert contents(open_checkpoint(one)) == contents(open_checkpoint(several))
    known = load_file(one / "model.safetensors")
    assert {name: tensor.shape for name, tensor in known.items()} == {
        name: torch.Size(info.shape) for name, info in open_checkpoint(several).infos.items()
    }


def test_the_index_decides_where_a_tensor_stands_twice(shards: Path) -> None:
    both = {"a": torch.zeros(4, 4), "b": torch.zeros(4, 4)}
    save_file(both, shards / "model-00002-of-00002.safetensors")
    source = open_checkpoint(shards)
    assert float(source.read("a")[0, 0]) == 1.0
    assert float(source.read("b")[0, 0]) == 0.0


@pytest.mark.parametrize("pickled", [False, True])
def test_a_single_file_next_to_an_index_is_read_as_transformers_does(
    checkpoint: Callable[..., Path], tmp_path: Path, pickled: bool
) -> None:
    shutil.copytree(checkpoint("llama", shard=SHARDED, pickled=pickled), tmp_path / "both")
    late = {name: tensor + 1 for name, tensor in load_file(checkpoint("llama") / "model.safetensors").items()}
    if pickled:
        torch.save(late, tmp_path / "both" / "pytorch_model.bin")
    else:
        save_file(late, tmp_path / "both" / "model.safetensors", metadata={"format": "pt"})
    taken = AutoModelForCausalLM.from_pretrained(tmp_path / "both").state_dict()["model.norm.weight"]
    assert torch.equal(open_checkpoint(tmp_path / "both").read("model.norm.weight"), taken)
    assert torch.equal(taken, late["model.norm.weight"])


@pytest.mark.parametrize("config", ['{"tie_word_embeddings": true}', '{"model_type": "gemma2"}'])
def test_a_tied_head_that_no_shard_holds_is_not_missed(shards: Path, config: str) -> None:
    (shards / "config.json").write_text(config)
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    write_index(shards, weight_map | {"lm_head.weight": weight_map["a"]})
    assert set(open_checkpoint(shards).infos) == {"a", "b"}


@pytest.mark.parametrize(
    "config", [None, "{", "[]", "{}", '{"tie_word_embeddings": false}', '{"model_type": "llama"}']
)
def test_a_head_of_its_own_that_no_shard_holds_is_refused(shards: Path, config: str | None) -> None:
    if config is not None:
        (shards / "config.json").write_text(config)
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    write_index(shards, weight_map | {"lm_head.weight": weight_map["a"]})
    with pytest.raises(CheckpointError, match="places lm_head.weight"):
        open_checkpoint(shards)


def test_shards_that_are_links_are_followed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    snapshot = tmp_path_factory.mktemp("snapshot")
    for path in shards.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    assert contents(open_checkpoint(snapshot)) == contents(open_checkpoint(shards))


@pytest.mark.parametrize("place", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b"])
def test_an_index_cannot_point_outside_its_directory(shards: Path, place: str) -> None:
    outside = shards / "a" if place == "a/b" else shards.parent
    outside.mkdir(exist_ok=True)
    for name in ("x", "b"):
        save_file({"b": torch.ones(1)}, outside / name)
    write_index(shards, {"a": "model-00001-of-00002.safetensors", "b": place})
    with pytest.raises(
        CheckpointError, match="places b in .*, which .*; fetch the checkpoint from a source that you trust"
    ):
        open_checkpoint(shards)


def test_an_index_that_names_an_absent_shard_is_refused(shards: Path) -> None:
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names model-00002-of-00002.safetensors, which does not exist"):
        open_checkpoint(shards)


def test_an_index_that_names_an_absent_tensor_is_refused(shards: Path) -> None:
    write_index(shards, {"a": "model-00001-of-00002.safetensors", "lost": "model-00002-of-00002.safetensors"})
    with pytest.raises(
        CheckpointError, match="places lost in model-00002-of-00002.safetensors, which does not"
    ):
        open_checkpoint(shards)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "[" * 100_000]
)
def test_an_index_that_is_none_is_refused(shards: Path, text: str) -> None:
    (shards / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="not a checkpoint index"):
        open_checkpoint(shards)


def test_a_truncated_shard_is_refused_by_name(shards: Path) -> None:
    shard = shards / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors is truncated"):
        open_checkpoint(shards)


@pytest.mark.parametrize("how", ["read", "chunks"])
def test_a_shard_that_shrinks_under_the_run_is_a_sentence(shards: Path, how: str) -> None:
    source = open_checkpoint(shards)
    shard = shards / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated while b was read"):
        source.read("b") if how == "read" else list(source.chunks("b", 16))


def test_a_shard_that_is_deleted_during_the_run_is_a_sentence(shards: Path) -> None:
    source = open_checkpoint(shards)
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="b cannot be read"):
        source.read("b")


def test_a_path_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("x")
    for name, complaint in (
        ("empty", "is empty"),
        ("file", "is a file"),
        ("other", "holds no model weights"),
    ):
        with pytest.raises(CheckpointError, match=complaint):
            open_checkpoint(tmp_path / name)


def test_a_path_that_does_not_exist_is_distinguished_from_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="absent does not exist"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path)
    assert type(refused.value) is CheckpointError


def test_reading_keeps_no_file_open_after_it_is_closed(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    source = SafetensorsSource([tmp_path / "model.safetensors"])
    source.read("wide")
    assert len(os.listdir("/proc/self/fd")) == before + 1
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert torch.equal(source.read("wide"), TENSORS["wide"])


@pytest.mark.parametrize("name", ["wide", "half", "tiny float"])
@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_blocks_of_rows_are_the_matrix(rows: int, name: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    blocks = [block.clone() for block in blocks_of_rows(open_checkpoint(tmp_path), name, rows)]
    assert torch.equal(torch.cat(blocks), TENSORS[name])
    assert all(len(block) <= rows for block in blocks)


def test_blocks_of_rows_do_not_depend_on_the_size_of_the_chunks(tmp_path: Path) -> None:
    class SmallChunks(SafetensorsSource):
        def chunks(self, name: str, size: int, buffer: memoryview | None = None) -> Iterator[memoryview]:
            return super().chunks(name, min(size, 3), buffer)

    save_file(TENSORS, tmp_path / "model.safetensors")
    source = SmallChunks([tmp_path / "model.safetensors"])
    blocks = [block.clone() for block in blocks_of_rows(source, "half", 2)]
    assert torch.equal(torch.cat(blocks), TENSORS["half"])
