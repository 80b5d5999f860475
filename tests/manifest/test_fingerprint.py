"""When two checkpoints count as the same model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.errors import ArtifactError
from svdconvert.manifest.fingerprint import (
    Checksum,
    checksum,
    config_checksum,
    headers_checksum,
    tensor_checksum,
)
from svdconvert.manifest.origin import fingerprint, same_model
from svdconvert.manifest.schema import Origin
from svdconvert.output.sidecars import read_config
from tests.tiny import SHARDED

Build = Callable[..., Path]
CONFIG = {"model_type": "llama", "hidden_size": 32, "dtype": "bfloat16", "rope": {"theta": 1.0, "dtype": "x"}}


def test_a_checksum_is_xxh3_for_any_chunks() -> None:
    data = memoryview(bytes(range(256)) * 100)
    total = Checksum()
    for chunk in (data[:7], data[7:7], data[7:]):
        total.update(chunk)
    assert total.text() == checksum(data) == xxhash.xxh3_64_hexdigest(bytes(data))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (
            {"transformers_version": "9", "_name_or_path": "x", "use_cache": False, "torch_dtype": "float16"},
            True,
        ),
        ({"dtype": "float32", "rope": {"dtype": "y", "theta": 1.0}}, True),
        ({"hidden_size": 33}, False),
        ({"rope": {"theta": 2.0}}, False),
        ({"model_type": "mistral"}, False),
        ({"new": 1}, False),
    ],
)
def test_a_config_is_compared_without_the_keys_that_saving_rewrites(
    change: dict[str, Any], same: bool
) -> None:
    assert (config_checksum(CONFIG | change) == config_checksum(CONFIG)) == same


def test_headers_are_names_shapes_and_dtypes_in_any_order() -> None:
    one, two = TensorInfo("a", (2, 3), "F32"), TensorInfo("b", (6,), "F32")
    assert headers_checksum([one, two]) == headers_checksum([two, one])
    for other in (
        TensorInfo("c", (2, 3), "F32"),
        TensorInfo("a", (3, 2), "F32"),
        TensorInfo("a", (2, 3), "I32"),
    ):
        assert headers_checksum([other, two]) != headers_checksum([one, two])


@pytest.mark.parametrize("options", [{}, {"shard": SHARDED}, {"pickled": True}])
def test_shards_and_formats_do_not_change_a_fingerprint(options: dict[str, Any], checkpoint: Build) -> None:
    one, other = (open_checkpoint(checkpoint("llama", **values)) for values in ({}, options))
    assert headers_checksum(one.infos.values()) == headers_checksum(other.infos.values())
    assert {name: tensor_checksum(one, name) for name in one.infos} == {
        name: tensor_checksum(other, name) for name in other.infos
    }


def recognised(directory: Path, origin: Origin) -> None:
    same_model(origin, directory, read_config(directory), open_checkpoint(directory))


@pytest.fixture
def model(checkpoint: Build, tmp_path: Path) -> tuple[Path, Origin]:
    """A copy of a tiny model, and how a manifest would name it."""
    copy = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    source = open_checkpoint(copy)
    checksums = {name: tensor_checksum(source, name) for name in source.infos}
    return copy, Origin(location="here", fingerprint=fingerprint(read_config(copy), source, checksums))


def test_a_model_is_recognised_and_another_is_not(model: tuple[Path, Origin], checkpoint: Build) -> None:
    directory, origin = model
    recognised(directory, origin)
    recognised(checkpoint("llama", shard=SHARDED), origin)
    for other in (
        checkpoint("qwen3"),
        checkpoint("llama", dtype=torch.float32),
        checkpoint("llama", tied=True),
    ):
        with pytest.raises(ArtifactError, match=r"is not the model .*\(here\): its tensor names, shapes"):
            recognised(other, origin)


def test_another_config_is_noticed(model: tuple[Path, Origin]) -> None:
    directory, origin = model
    config = read_config(directory)
    (directory / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(ArtifactError, match="its config.json differs"):
        recognised(directory, origin)


def test_other_weights_of_the_same_shapes_are_noticed(model: tuple[Path, Origin]) -> None:
    directory, origin = model
    weights = load_file(directory / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, directory / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"the values of \S+ differ"):
        recognised(directory, origin)
