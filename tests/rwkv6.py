"""Random RWKV-6 checkpoints as their author's program saves them: one .pth, its names in its order."""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from tests.tiny import decaying

# (suffix of the name, sizes of its shape) in the order of a real file; L layers, width C, heads H of size N,
# mixing rank D, decay rank E, feed-forward F, vocabulary V.
_BLOCK = """
ln1.weight C|ln1.bias C|ln2.weight C|ln2.bias C|ln0.weight C|ln0.bias C|
att.time_maa_x 1 1 C|att.time_maa_w 1 1 C|att.time_maa_k 1 1 C|att.time_maa_v 1 1 C|att.time_maa_r 1 1 C|
att.time_maa_g 1 1 C|att.time_maa_w1 C 5D|att.time_maa_w2 5 D C|att.time_decay 1 1 C|att.time_decay_w1 C E|
att.time_decay_w2 E C|att.time_faaaa H N|att.receptance.weight C C|att.key.weight C C|att.value.weight C C|
att.output.weight C C|att.gate.weight C C|att.ln_x.weight C|att.ln_x.bias C|ffn.time_maa_k 1 1 C|
ffn.time_maa_r 1 1 C|ffn.key.weight F C|ffn.receptance.weight C C|ffn.value.weight C F
"""


def shapes(layers: int, width: int, head: int, vocabulary: int) -> "OrderedDict[str, tuple[int, ...]]":
    """Name -> shape of every tensor of a model."""
    sizes = {"C": width, "N": head, "H": width // head, "D": 5, "5D": 25, "E": 6, "V": vocabulary}
    sizes["F"] = int(width * 3.5) // 32 * 32
    block = [entry.split() for entry in _BLOCK.replace("\n", "").split("|")]
    table = OrderedDict([("emb.weight", (vocabulary, width))])
    for layer in range(layers):
        for name, *letters in block:
            if layer == 0 or not name.startswith("ln0"):
                table[f"blocks.{layer}.{name}"] = tuple(sizes.get(x) or int(x) for x in letters)
    return table | {"ln_out.weight": (width,), "ln_out.bias": (width,), "head.weight": (vocabulary, width)}


def random_model(
    *, layers: int = 2, width: int = 64, head: int = 32, vocabulary: int = 61, state: bool = False
) -> "OrderedDict[str, Tensor]":
    """Random float32 values everywhere, at sizes at which the logits are of order one."""
    noise = torch.Generator().manual_seed(layers + width + head + vocabulary)
    tensors: OrderedDict[str, Tensor] = OrderedDict()
    for name, shape in shapes(layers, width, head, vocabulary).items():
        value = torch.randn(shape, generator=noise)
        if name.endswith(("ln1.weight", "ln2.weight", "ln0.weight", "ln_x.weight", "ln_out.weight")):
            tensors[name] = 1 + 0.1 * value
        elif name.endswith(".weight") and len(shape) == 2:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(noise.initial_seed()) + len(tensors))
                tensors[name] = decaying(*shape)
            tensors[name][::5, ::7] = -0.0
        elif name.endswith(".time_decay"):
            tensors[name] = 2 * value - 2
        else:
            tensors[name] = 0.3 * value
        if state and name.endswith("time_faaaa"):
            heads, size = shape
            tensors[name.replace("faaaa", "state")] = torch.randn(heads, size, size, generator=noise)
    return tensors


def save(tensors: "OrderedDict[str, Tensor]", path: Path, dtype: torch.dtype | None = torch.bfloat16) -> Path:
    """Write a .pth file, in one dtype or as the tensors are."""
    torch.save(
        OrderedDict((name, tensor.to(dtype or tensor.dtype)) for name, tensor in tensors.items()), path
    )
    return path
