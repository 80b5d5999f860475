"""PyTorch's own files: plain tensors are read, code is never run."""

import os
import pickle
import random
import resource
import zipfile
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


def archive(path: Path, code: bytes) -> Path:
    """A .pth whose pickle is `code`, without its frame."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02" + code + b".")
        file.writestr("x/byteorder", "little")
        file.writestr("x/version", "3\n")
    return path


EIGHT_GIGABYTES = b"\x8a\x05\x00\x00\x00\x00\x02\x85R"
ODD = {
    "a bytearray of eight gigabytes": b"cbuiltins\nbytearray\n" + EIGHT_GIGABYTES,
    "the same under its old name": b"c__builtin__\nbytearray\n" + EIGHT_GIGABYTES,
    "a tensor of eight gigabytes": b"ctorch\nTensor\n" + EIGHT_GIGABYTES,
    "a memo that is not there": b"h\x05",
    "an empty stack": b"",
    "a key that is a list": b"}]]s",
    "a key that is a number": b"}K\x01]s",
    "a mark that is not there": b"t",
    "code": b"cos\ngetcwd\n)R",
}


@pytest.mark.parametrize("what", ODD)
def test_an_odd_pickle_is_refused_without_taking_memory(tmp_path: Path, what: str) -> None:
    file = archive(tmp_path / "pytorch_model.bin", ODD[what])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), hard))
    try:
        with pytest.raises(CheckpointError, match="pytorch_model.bin"):
            open_checkpoint(file.parent)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_only_a_pickle_that_names_code_is_said_to_hold_code(tmp_path: Path) -> None:
    for what, complaint in (("code", "can run code"), ("a memo that is not there", "damaged")):
        archive(tmp_path / "pytorch_model.bin", ODD[what])
        with pytest.raises(CheckpointError, match=complaint):
            open_checkpoint(tmp_path)


def test_damaged_pickles_are_sentences(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.arange(6.0).reshape(2, 3), "v": torch.ones(4).bfloat16()}, file)
    good = file.read_bytes()
    chance = random.Random(7)  # noqa: S311 (a fixed sequence)
    refused = 0
    for _ in range(300):
        raw = bytearray(good)
        raw[chance.randrange(60, 320)] = chance.randrange(256)
        file.write_bytes(raw)
        try:
            contents(open_checkpoint(tmp_path))
        except CheckpointError:
            refused += 1
    assert refused > 50


def test_a_view_that_is_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(1 << 40)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="w is larger than the file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [torch.ones(2, device="meta"), torch.ones(2, dtype=torch.complex64).conj()])
def test_a_tensor_without_values_of_its_own_is_refused(tmp_path: Path, value: torch.Tensor) -> None:
    torch.save({"w": value}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        open_checkpoint(tmp_path)


def cut(file: Path) -> None:
    os.truncate(file, 100)


@pytest.mark.parametrize("how", ["read", "chunks"])
@pytest.mark.parametrize(
    ("change", "complaint"), [(cut, "was truncated while w"), (os.unlink, "No such file")]
)
@pytest.mark.parametrize("tensor", [torch.ones(400, 250), torch.ones(250, 400).T], ids=["rows", "columns"])
def test_a_file_that_is_cut_during_the_run_is_a_sentence(
    tmp_path: Path, how: str, change: Callable[[Path], None], complaint: str, tensor: torch.Tensor
) -> None:
    torch.save({"w": tensor}, tmp_path / "pytorch_model.bin")
    source = open_checkpoint(tmp_path)
    change(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=complaint):
        source.read("w") if how == "read" else list(source.chunks("w", 1000))


def test_a_file_that_is_cut_between_two_chunks_of_a_tensor_is_a_sentence(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(100_000)}, tmp_path / "pytorch_model.bin")
    chunks = open_checkpoint(tmp_path).chunks("w", 4000)
    next(chunks)
    cut(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="was truncated while w"):
        next(chunks)


def test_no_page_of_a_file_is_mapped(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(100_000)}, tmp_path / "pytorch_model.bin")
    source = open_checkpoint(tmp_path)
    kept = source.read("w")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert torch.equal(kept, torch.ones(100_000))


def test_an_archive_with_compressed_values_is_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain.pth"
    torch.save({"w": torch.zeros(1000), "v": torch.zeros(10)}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        contents(open_checkpoint(tmp_path))


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.arange(6.0).reshape(2, 3), "v": torch.ones(400)}, file)
    content = file.read_bytes()
    assert content.count(b"K\x02K\x03") == 1  # the shape in the pickle
    file.write_bytes(content.replace(b"K\x02K\x03", b"K\x02K\x63"))
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        contents(open_checkpoint(tmp_path))


def test_a_single_element_and_an_empty_tensor_are_read(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "row": torch.ones(5, 8)[:1, ::2]}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    source = open_checkpoint(tmp_path)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())
