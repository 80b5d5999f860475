"""transformers' Conv1D, of GPT-2: a linear layer whose weight is stored as (in, out)."""

from torch import nn

from svdconvert.models.matrices import is_conv1d


def as_linear(module: nn.Module) -> nn.Module:
    """A Conv1D as the nn.Linear that does the same, with the same memory; any other module as it is."""
    if not is_conv1d(module):
        return module
    weight_IO = module.get_parameter("weight")
    inputs, outputs = weight_IO.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(weight_IO.detach().mT, requires_grad=False)
    linear.bias = nn.Parameter(module.get_parameter("bias").detach(), requires_grad=False)
    return linear
