"""The head of a language model: which positions it is computed for, and whether its output is the logits.

B: rows, T: tokens, N: tokens in the loss, H: width of the hidden states.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.training.optim.cross_entropy import head_cross_entropy


def find_head(model: nn.Module) -> nn.Module | None:
    """The module that computes the logits of a model of transformers; None if it is not known."""
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    return head if isinstance(head, nn.Module) else None


@torch.no_grad()
def has_plain_head(model: nn.Module) -> bool:
    """True if the logits are the output of a frozen linear layer, and nothing changes them afterwards.

    Some families scale their logits or bound them by a tanh. So a forward pass of two tokens, in which the
    head's output is replaced by known numbers, must return these numbers.
    """
    head = find_head(model)
    if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
        return False
    known: list[Tensor] = []

    def replace(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        known.append(torch.linspace(-50.0, 50.0, output.numel()).view_as(output).to(output))
        return known[-1]

    hook = head.register_forward_hook(replace)
    try:
        logits = model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=head.weight.device)).logits
    finally:
        hook.remove()
    return len(known) == 1 and torch.equal(known[0].to(logits.dtype), logits)


@contextmanager
def head_restricted_to(in_loss_BT: Tensor, model: nn.Module) -> Iterator[bool]:
    """Compute logits only at the given positions, as a single row; yields False if the head is not known.

    The logits are by far the largest activation of a small model, and its head is a fifth of the work;
    those of prompts and padding are not needed.
    """
    head = find_head(model)
    if head is None:
        yield False
        return
    hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0][in_loss_BT][None],))
    try:
        yield True
    finally:
        hook.remove()


@dataclass(slots=True)
class HeadInput:
    """What a plain head is given at the positions in the loss."""

    head: nn.Linear
    hidden_NH: Tensor

    def cross_entropy(self, targets_N: Tensor) -> Tensor:
        """The loss of the logits that the head would compute, summed over the tokens."""
        dtype = self.hidden_NH.dtype
        weight_VH = self.head.weight.to(dtype)
        bias_V = None if self.head.bias is None else self.head.bias.to(dtype)
        return head_cross_entropy(self.hidden_NH, weight_VH, bias_V, targets_N)


@contextmanager
def head_skipped(in_loss_BT: Tensor, model: nn.Module) -> Iterator[list[HeadInput]]:
    """Compute the logits of a plain head for one token only; yields a list that its real input is put into.

    The hidden states are in autocast's dtype under autocast, as in the head's own product.
    """
    head = find_head(model)
    assert isinstance(head, nn.Linear)
    found: list[HeadInput] = []

    def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden_BTH = inputs[0]
        device = hidden_BTH.device.type
        hidden_NH = hidden_BTH[in_loss_BT]
        if torch.is_autocast_enabled(device):
            hidden_NH = hidden_NH.to(torch.get_autocast_dtype(device))
        found.append(HeadInput(head, hidden_NH))
        # Not [:1, :1], with whose strides torch computes the product by a copy of the transposed weight.
        return (hidden_BTH[0, 0][None, None],)

    hook = head.register_forward_pre_hook(take)
    try:
        yield found
    finally:
        hook.remove()
