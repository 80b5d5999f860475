"""PyTorch's own files: plain tensors are read, code is never run."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.errors import CheckpointError
from tests.checkpoint.test_safetensors_files import contents
from tests.tiny import SHARDED


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("shard", ["5GB", SHARDED])
def test_bin_files_hold_what_the_safetensors_held(checkpoint: Callable[..., Path], shard: str) -> None:
    pickled = checkpoint("qwen2", shard=shard, pickled=True)
    assert not list(pickled.glob("*.safetensors"))
    assert contents(open_checkpoint(pickled)) == contents(open_checkpoint(checkpoint("qwen2")))


def test_views_and_shared_storages_are_read_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": whole, "same": whole, "transposed": whole.T, "part": whole[1:, ::2]}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    source = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(source.read(name), tensor)
        assert contents(source)[name] == bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(tmp_path: Path, zipped: bool) -> None:
    trap = tmp_path / "trap"
    content = {"w": torch.ones(2), "x": Trap(trap)}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        open_checkpoint(tmp_path)
    assert not trap.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert trap.exists(), "the trap of this test does not work"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([torch.ones(2)], "not a state dict"),
        ({"model": {"w": torch.ones(2)}}, "not a state dict"),
        ({"w": torch.ones(2), "step": 3}, "not a state dict"),
        (torch.ones(2), "not a state dict"),
        ({"w": torch.ones(2).to_sparse()}, "dense"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object, complaint: str) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04 not a zip", b"hello", pickle.dumps({"w": 1})])
def test_a_damaged_file_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(raw)
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        open_checkpoint(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1000)}, tmp_path / "pytorch_model.bin")
    os.truncate(tmp_path / "pytorch_model.bin", 3000)
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(tmp_path)


def test_an_index_that_names_an_absent_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "a.bin", "lost": "a.bin"}}')
    with pytest.raises(CheckpointError, match="places lost in a.bin"):
        open_checkpoint(tmp_path)


def test_safetensors_are_preferred(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint("llama")
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"rubbish")
    assert contents(open_checkpoint(tmp_path)) == contents(open_checkpoint(source))
