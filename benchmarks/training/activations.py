"""What a forward pass of 1024 tokens saves for its backward pass, tensor by tensor.

Started by benchmarks/train.py:

python activations.py OPTIONS-AS-JSON
"""

import json
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from step import adapted_network
from torch import Tensor, nn

from svdconvert.training.model.modes import training_mode

LENGTH = 1024
METHODS = ("lora", "lora-fa")
console = Console(width=110)


def main() -> None:
    """Print what is saved by module, shape and dtype, and the sums."""
    options = SimpleNamespace(**json.loads(sys.argv[1]))
    kept = {method: _kept(options, method) for method in METHODS}
    table = Table("kept by", "shape", "dtype", *(f"{method}, MB" for method in METHODS), "difference, MB")
    keys = sorted({key for found in kept.values() for key in found}, key=lambda key: -kept["lora"][key])
    for key in keys:
        sizes = [kept[method][key] / 1e6 for method in METHODS]
        table.add_row(*key, *(f"{size:.1f}" for size in sizes), f"{sizes[0] - sizes[1]:.1f}")
    totals = [sum(kept[method].values()) / 1e6 for method in METHODS]
    table.add_row("all", "", "", *(f"{total:.1f}" for total in totals), f"{totals[0] - totals[1]:.1f}")
    console.print(f"activations of one row of {LENGTH} tokens, rank {options.rank}, {options.precision}")
    console.print(table)
    console.print(f"lora keeps {totals[0] / totals[1]:.3f} times the activations of lora-fa")


def _kept(options: Any, method: str) -> Counter[tuple[str, str, str]]:
    """(module that saves it, shape, dtype) -> bytes; without weights, each storage counted once."""
    model = adapted_network(SimpleNamespace(**vars(options), method=method))
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found: Counter[tuple[str, str, str]] = Counter()
    seen: dict[int, Tensor] = {}
    inside: list[str] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, inputs: inside.append(type(module).__name__))
        module.register_forward_hook(lambda module, inputs, output: inside.pop() and None)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.data_ptr() not in seen:
            # Keep a reference, so that no other tensor reuses its address.
            seen[storage.data_ptr()] = tensor.detach()
            shape = " x ".join(map(str, tensor.shape))
            kind = str(tensor.dtype).removeprefix("torch.")
            found[inside[-1] if inside else "the loss", shape, kind] += storage.nbytes()
        return tensor

    ids = torch.arange(3, 3 + LENGTH)[None]
    with (
        training_mode(model),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"),
    ):
        _body(model)(input_ids=ids)
    return found


def _body(model: Any) -> nn.Module:
    """The model without its head, whose logits are the same for all methods."""
    body: nn.Module = model.base_model
    return body


if __name__ == "__main__":
    main()
