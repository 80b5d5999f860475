"""A model may be one file of tensors, with its config.json next to it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from svdconvert.commands.decompose import decompose
from svdconvert.commands.inspect import inspect
from svdconvert.commands.merge import merge
from svdconvert.config.options import MergeOptions, SplitOptions
from svdconvert.errors import CheckpointError
from svdconvert.inputs.model import open_model
from tests.stock import same_bytes, start_of, tensors
from tests.tiny import SHARDED

Build = Callable[..., Path]
OPTIONS = SplitOptions(rank=2)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_a_file_with_a_configuration_next_to_it_is_a_model(
    name: str, checkpoint: Build, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(checkpoint("llama"), base)
    (base / "model.safetensors").rename(base / name)
    decompose(base / name, tmp_path / "file", OPTIONS)
    decompose(checkpoint("llama"), tmp_path / "directory", OPTIONS)
    assert same_bytes(tensors(tmp_path / "file"), tensors(tmp_path / "directory"))
    assert (tmp_path / "file" / "config.json").read_bytes() == (
        tmp_path / "directory" / "config.json"
    ).read_bytes()
    merge(
        start_of(tmp_path / "file"),
        tmp_path / "back",
        MergeOptions(side="base"),
        residual=str(tmp_path / "file"),
    )
    assert same_bytes(tensors(tmp_path / "back"), tensors(checkpoint("llama")))


def test_pickled_shards_and_a_pickled_file_are_models(checkpoint: Build, tmp_path: Path) -> None:
    wanted = decompose(checkpoint("llama"), tmp_path / "wanted", OPTIONS)
    shards = checkpoint("llama", pickled=True, shard=SHARDED)
    assert len([*shards.glob("pytorch_model-*.bin")]) > 1
    whole = checkpoint("llama", pickled=True) / "pytorch_model.bin"
    for number, model in enumerate((shards, whole)):
        out = tmp_path / str(number)
        assert decompose(model, out, OPTIONS).matrices == wanted.matrices
        assert same_bytes(tensors(out), tensors(tmp_path / "wanted"))


def test_a_shard_alone_is_refused(checkpoint: Build) -> None:
    base = checkpoint("llama", shard=SHARDED)
    shard = next(base.glob("model-00001-of-*.safetensors"))
    with pytest.raises(CheckpointError, match=rf"is one of \d+ files of a model; give {base}"):
        open_model(str(shard))


def test_a_file_without_a_configuration_needs_a_layout(checkpoint: Build, tmp_path: Path) -> None:
    shutil.copy(checkpoint("llama") / "model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no known layout \(such as .* no config.json .*--layout names"
    ):
        decompose(tmp_path / "alone.safetensors", tmp_path / "out", OPTIONS)
    found = decompose(tmp_path / "alone.safetensors", tmp_path / "out", SplitOptions(rank=2, layout="names"))
    known = decompose(checkpoint("llama"), tmp_path / "known", OPTIONS)
    assert found.matrices == known.matrices
    assert inspect(tmp_path / "out").kind == "decomposed"


def test_another_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("")
    with pytest.raises(CheckpointError, match="is a file; give the directory"):
        open_model(str(tmp_path / "model.txt"))


def test_a_pickled_file_next_to_safetensors_stays_what_was_asked_for(
    checkpoint: Build, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(checkpoint("llama", pickled=True), base)
    save_file({}, base / "model.safetensors")
    assert open_model(str(base / "pytorch_model.bin")).path == base / "pytorch_model.bin"
    assert not open_model(str(base)).source.infos
