"""Targets that hold tensors: safetensors, indexes, PyTorch's files, names of tensors, and a vocabulary."""

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch

from svdconvert.checkpoint.rename_rules import sort_by_rules
from svdconvert.checkpoint.renamed import as_family, as_layout
from svdconvert.checkpoint.safetensors_files import (
    SafetensorsSource,
    open_checkpoint,
    read_header,
    read_index,
)
from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.checkpoint.torch_files import PickledSource
from svdconvert.errors import SvdConvertError
from svdconvert.layouts.base import LAYOUTS
from svdconvert.layouts.detect import find_layout, has_signature_tensor
from svdconvert.models.world_tokenizer import load_tokenizer
from svdconvert.training.optim.checkpoints import Checkpoints
from tests.checkpoint.test_header_corpus import FORBIDDEN, KEPT, of_the_library, packed
from tests.fuzz.mutate import change_bytes, change_json, change_text
from tests.fuzz.target import Target


def _read_safetensors(raw: bytes, directory: Path) -> None:
    """As the safetensors library reads it, and with the bytes that the header says."""
    file = directory / "model.safetensors"
    file.write_bytes(raw)
    extents = read_header(file)
    assert {extent.info.name: list(extent.info.shape) for extent in extents} == of_the_library(file)
    source = SafetensorsSource([file])
    for extent in extents:
        begin, end = extent.begin, extent.begin + extent.info.nbytes
        assert b"".join(bytes(chunk) for chunk in source.chunks(extent.info.name, 7)) == raw[begin:end]
    source.close()


def _change_safetensors(chance: Random, raw: bytes) -> bytes:
    """A changed header with its length, or changed bytes anywhere."""
    length = int.from_bytes(raw[:8], "little")
    if chance.random() < 0.2 or length > len(raw):
        return change_bytes(chance, raw)
    header = change_json(chance, raw[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + raw[8 + length :]


def _read_index(raw: bytes, directory: Path) -> None:
    """As json reads it; then the shards are opened, which are there under the names of the seeds."""
    path = directory / "model.safetensors.index.json"
    path.write_bytes(raw)
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (directory / name).write_bytes(packed(_SHARD.replace("NAME", name[6:11]), 8))
    (directory / "config.json").write_text('{"tie_word_embeddings": true}')
    found = read_index(path)
    known = json.loads(raw)["weight_map"]
    assert found == known or {str(name): str(file) for name, file in known.items()} == found
    assert all("/" not in file and not file.startswith(".") for file in found.values())
    open_checkpoint(directory)


def _read_pickled(raw: bytes, directory: Path) -> None:
    """As torch.load(weights_only=True) reads a mapped file onto the CPU."""
    file = directory / "model.pth"
    file.write_bytes(raw)
    source = PickledSource([file])
    known = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    known = known.get("state_dict", known) if isinstance(known.get("state_dict"), dict) else known
    assert {name.removeprefix("model.") for name in source.infos} == {
        name.removeprefix("model.") for name in known
    }
    for name in source.infos:
        tensor = known[name] if name in known else known[f"model.{name}"]
        assert source.read(name).shape == tensor.shape
        assert b"".join(bytes(chunk) for chunk in source.chunks(name, 64)) == _bytes_of(tensor)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return (
        bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) if tensor.numel() else b""
    )


def _change_pickled(chance: Random, raw: bytes) -> bytes:
    """Changed bytes of the archive, or of one file in it with a checksum that is right again."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    except Exception:  # a seed that is damaged already
        return change_bytes(chance, raw)
    if chance.random() < 0.25:
        return change_bytes(chance, raw)
    pickles = [name for name in entries if name.endswith("data.pkl")]
    name = chance.choice(pickles if pickles and chance.random() < 0.8 else [*entries])
    entries[name] = change_bytes(chance, entries[name])
    packed_again = io.BytesIO()
    kind = chance.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(packed_again, "w", kind) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    return packed_again.getvalue()


def _read_training_state(raw: bytes, directory: Path) -> None:
    """A checkpoint of an unfinished training run."""
    (directory / "step-00000003.pt").write_bytes(raw)
    checkpoints = Checkpoints(directory, every=3)
    if checkpoints.step:
        assert isinstance(checkpoints.load_newest(), dict)


def _saved(**values: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(values, stream)
    return stream.getvalue()


class _Headers:
    """A source of tensors without data."""

    def __init__(self, names: list[str]) -> None:
        self.infos: Mapping[str, TensorInfo] = {name: TensorInfo(name, (2, 2), "F32") for name in names}

    def read(self, name: str) -> torch.Tensor:
        return torch.zeros(2, 2)

    def chunks(self, name: str, size: int, buffer: memoryview | None = None) -> Iterator[memoryview]:
        yield memoryview(bytes(16))

    def file_versions(self) -> Mapping[str, list[int]]:
        return {}


def _read_names(raw: bytes, directory: Path) -> None:
    """Names of tensors, as every layout understands them."""
    try:
        names = [str(name) for name in json.loads(raw)["names"]]
        kind = json.loads(raw).get("model_type")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    source = _Headers(names)
    has_signature_tensor(source.infos)
    for layout in map(LAYOUTS.get, LAYOUTS.names()):
        slots = layout.slots(source.infos)
        assert {*slots} <= {*names}
        assert all(slot.layer >= 0 and str(slot.layer) in name for name, slot in slots.items())
        if layout.family is not None:
            assert sorted(sort_by_rules(source.infos, layout.family.rules)) == sorted(source.infos)
            try:
                family = as_family(source, layout.family.rules, "it")
                as_layout(family, layout.family.rules, "it")
            except SvdConvertError:
                continue
    find_layout(None, kind, "it", source.infos)


def _read_vocabulary(raw: bytes, directory: Path) -> None:
    """A vocabulary of RWKV World; what it encodes it also decodes."""
    (directory / "rwkv_vocab_x.txt").write_bytes(raw)
    tokenizer = load_tokenizer(directory, 1000)
    text = "a é \n 1"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [end for _, end in tokenizer(text)["offset_mapping"]][-1] == len(text)


_SHARD = '{"NAME":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
_TWO = (
    '{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
    '"b.c":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}}'
)
_INDEX = {
    "metadata": {"total_size": 16},
    "weight_map": {
        "00001": "model-00001-of-00002.safetensors",
        "00002": "model-00002-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    },
}
_BLOCKS = ["blocks.0.att.time_maa_x", "blocks.0.att.key.weight", "blocks.1.ffn.value.weight", "emb.weight"]
_LLAMA = [
    f"model.layers.{layer}.{part}.weight" for layer in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")
]
_TINY_VOCABULARY = (
    "".join(f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256)) + "257 'ab' 2\n258 ' é' 3\n"
)

TARGETS = {
    "safetensors": Target(
        _read_safetensors,
        _change_safetensors,
        share=30,
        seeds=[packed(_TWO, 32), *(packed(*kept) for kept in (*KEPT, *FORBIDDEN))],
    ),
    "index": Target(_read_index, share=20, seeds=[json.dumps(_INDEX).encode()]),
    "pickled": Target(
        _read_pickled,
        _change_pickled,
        share=20,
        seeds=[
            _saved(a=torch.arange(6.0).reshape(2, 3), b=torch.zeros(3, dtype=torch.bfloat16)),
            _saved(state_dict={"model.emb.weight": torch.ones(2, 2).T}, epoch=1),
        ],
    ),
    "training-state": Target(
        _read_training_state,
        _change_pickled,
        share=10,
        seeds=[_saved(step=3, tensors={"a": torch.ones(2)}, scheduler={"last": 0.1})],
    ),
    "tensor-names": Target(
        _read_names,
        share=10,
        seeds=[
            json.dumps({"names": names, "model_type": kind}).encode()
            for names, kind in ((_BLOCKS, None), (_LLAMA, "llama"), (_LLAMA, "mamba"))
        ],
    ),
    "vocabulary": Target(
        _read_vocabulary,
        change_text(
            ["(" * 300, "-" * 5000, "9 100000000000 1\n", "9 bytes(4) 4", "7 'é' 2\n", "b'\\xff'", "{0}"]
        ),
        share=10,
        seeds=[_TINY_VOCABULARY.encode()],
    ),
}
