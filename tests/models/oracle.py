"""The rwkv package, in a process of its own: importing it changes settings of torch."""

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

PROGRAM = """
import os, sys
os.environ.update(RWKV_JIT_ON="0", RWKV_CUDA_ON="0", RWKV_V7_ON="0")
import torch
torch.set_num_threads(1)
from rwkv.model import RWKV
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
state, logits = None, []
for tokens in sys.argv[3:]:
    out, state = model.forward([int(token) for token in tokens.split(",")], state, full_output=True)
    logits.append(out.reshape(-1, out.shape[-1]))
torch.save(logits, sys.argv[2])
"""

needs_rwkv = pytest.mark.skipif(find_spec("rwkv") is None, reason="needs the package rwkv to compare with")


def rwkv_logits(model: Path, folder: Path, *sequences: Sequence[int]) -> list[Tensor]:
    """Logits (T, V) of each sequence, which go on from one another, as the rwkv package has them."""
    out = folder / "logits.pt"
    words = [",".join(map(str, tokens)) for tokens in sequences]
    program = [sys.executable, "-c", PROGRAM, str(model), str(out), *words]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[Tensor] = torch.load(out)
    return found
