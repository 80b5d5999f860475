"""A trained RWKV-6 of 3M parameters with published logits, from the tests of rwkv.cpp (MIT licence).

tests/tiny-rwkv-6v0-3m-Q5_1.bin and tests/expected-logits-6v0-3m.bin of github.com/RWKV/rwkv.cpp: a model on
bytes (L12, C128, 16 heads of size 8, vocabulary 256), and its logits in float32 after the three bytes
`"in`. Too large for this repository; put both into .cache/rwkv6-3m, or name their directory in
SVDCONVERT_RWKV6_3M.
"""

import os
from collections import OrderedDict
from pathlib import Path
from struct import unpack_from

import numpy as np
import torch
from torch import Tensor

_HERE = Path(__file__).resolve().parents[1] / ".cache" / "rwkv6-3m"
DIRECTORY = Path(os.environ.get("SVDCONVERT_RWKV6_3M", _HERE))
MODEL = DIRECTORY / "tiny-rwkv-6v0-3m-Q5_1.bin"
LOGITS = DIRECTORY / "expected-logits-6v0-3m.bin"
PROMPT = b'"in'

_FLOAT, _HALF, _Q5_1 = 0, 1, 8
_TRANSPOSED = ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2")


def expected_logits() -> Tensor:
    """(256,)"""
    return torch.from_numpy(np.fromfile(LOGITS, dtype="<f4"))


def trained_model() -> "OrderedDict[str, Tensor]":
    """The model's tensors as a .pth has them, in float32."""
    data = MODEL.read_bytes()
    assert unpack_from("<2i", data) == (0x67676D66, 101)
    at = 24
    tensors: OrderedDict[str, Tensor] = OrderedDict()
    while at < len(data):
        dims, length, kind = unpack_from("<3i", data, at)
        shape = unpack_from(f"<{dims}i", data, at + 12)[::-1]
        name = data[at + 12 + 4 * dims : at + 12 + 4 * dims + length].decode()
        at += 12 + 4 * dims + length
        values, at = _values(data, at, kind, int(np.prod(shape)))
        tensors[name] = _as_published(name, torch.from_numpy(values.reshape(shape)))
    return tensors


def _values(data: bytes, at: int, kind: int, count: int) -> tuple["np.ndarray", int]:
    """`count` numbers from the offset `at` on, and the offset of their end."""
    if kind in (_FLOAT, _HALF):
        dtype = np.dtype("<f4" if kind == _FLOAT else "<f2")
        end = at + count * dtype.itemsize
        return np.frombuffer(data[at:end], dtype).astype(np.float32), end
    assert kind == _Q5_1, f"type {kind}"
    # Blocks of 32 numbers: scale, minimum, the fifth bits, and the lower four bits in pairs.
    end = at + count // 32 * 24
    block = np.dtype([("d", "<f2"), ("m", "<f2"), ("high", "<u4"), ("low", "u1", 16)])
    blocks = np.frombuffer(data[at:end], block)
    low = np.concatenate([blocks["low"] & 15, blocks["low"] >> 4], axis=1)
    high = blocks["high"][:, None] >> np.arange(32, dtype=np.uint32) & 1
    numbers = (low | high << 4) * blocks["d"].astype(np.float32)[:, None]
    return (numbers + blocks["m"].astype(np.float32)[:, None]).reshape(-1).astype(np.float32), end


def _as_published(name: str, tensor: Tensor) -> Tensor:
    """The shape and orientation of a .pth, from those of rwkv.cpp."""
    part = name.rsplit(".", 1)[-1]
    if part in _TRANSPOSED:
        return tensor.mT.contiguous()
    if part.startswith("time_maa_") or part == "time_decay":
        return tensor.reshape(1, 1, -1)
    return tensor.reshape(-1, 8) if part == "time_faaaa" else tensor
