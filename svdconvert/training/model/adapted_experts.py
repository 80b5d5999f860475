"""The frozen experts of a layer plus low-rank adapters.

E: experts, N: tokens, K: experts per token, H: hidden size, O: out features, I: in features.

transformers has all experts of a layer in one module, with parameters (E, O, I) or (E, I, O). PEFT adds the
change to all of them in every step. Here only the tokens that the router sends to an expert are multiplied
with its factors, and no matrix of the size of an expert is made.

Modules that follow transformers' interface for experts (`transformers.integrations.moe`, of version 5) say
what is computed between the two products; a part of it is private there (`_apply_gate`), and this file is
the only one that uses it. For other modules the change is added to the parameters, as PEFT does it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from svdconvert.training.model.expert_branch import Applied, ExpertBranch

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")


class AdaptedExperts(nn.Module):
    """The module `base`, with parameters (E, O, I) or (E, I, O), plus factors for each of its experts."""

    def __init__(self, base: nn.Module, branches: Mapping[str, Sequence[ExpertBranch]]) -> None:
        """`branches` are the factors by the names of the parameters that they change."""
        super().__init__()
        self.base = base.requires_grad_(False)
        self.branches = nn.ModuleDict({name: nn.ModuleList(each) for name, each in branches.items()})

    def __getattr__(self, name: str) -> Any:
        """What the base has, such as the number of its experts."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def own_branches(self) -> Iterator[ExpertBranch]:
        """All factors."""
        for module in self.branches.modules():
            if isinstance(module, ExpertBranch):
                yield module

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """What the base computes of its arguments, with the changed parameters."""
        base: Any = self.base
        routed = [*arguments, *named.values()]
        if len(routed) == 2 and all(hasattr(base, name) for name in _INTERFACE):  # noqa: PLR2004 (the router's)
            return self._routed(hidden_states, *routed)
        changed = {name: self._changed(name) for name in self.branches}
        found: Tensor = functional_call(base, changed, (hidden_states, *arguments), named)
        return found

    def _changed(self, name: str) -> Tensor:
        """A parameter plus the change by its factors."""
        weight = self.base.get_parameter(name)
        transposed = bool(getattr(self.base, "is_transposed", False))
        delta = torch.zeros(weight.mT.shape if transposed else weight.shape, device=weight.device)
        for branch in self._of(name):
            experts = torch.tensor(list(branch.position), device=weight.device)
            rows = torch.arange(delta.shape[1], device=weight.device)
            rows = rows if branch.rows is None else rows[branch.rows.slice]
            delta = delta.index_put((experts[:, None], rows[None]), branch.delta(), accumulate=True)
        return (weight + (delta.mT if transposed else delta)).to(weight.dtype)

    def _of(self, name: str) -> list[ExpertBranch]:
        return [module for module in self.branches[name].modules() if isinstance(module, ExpertBranch)]

    def _routed(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(..., H) -> (..., H): the sum over each token's experts, weighted by the router.

        `top_k_index` and `top_k_weights` are (N, K).
        """
        base: Any = self.base
        tokens_NH = hidden.reshape(-1, hidden.shape[-1])
        count, per_token = top_k_index.shape
        flat = top_k_index.reshape(-1)
        order = torch.sort(flat, stable=True).indices
        sizes = torch.bincount(flat, minlength=base.num_experts)[: base.num_experts].tolist()
        order = order[: sum(sizes)]  # a number above the experts' stands for no expert
        x = tokens_NH[order // per_token]
        if base.has_gate:
            inner = base._apply_gate(self._product("gate_up_proj", x, sizes))
        else:
            inner = base.act_fn(self._product("up_proj", x, sizes))
        out = self._product("down_proj", inner, sizes)
        if getattr(base, "has_post_expert_norm", False):
            out = base.post_expert_norm(out)
        weighted = out * top_k_weights.reshape(-1)[order][:, None]
        spread = weighted.new_zeros(count * per_token, weighted.shape[-1]).index_copy(0, order, weighted)
        return spread.view(count, per_token, -1).sum(dim=1).to(hidden.dtype).view_as(hidden)

    def _product(self, name: str, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """The tokens of each expert times its matrix, with its factors; `sizes` are the numbers of tokens."""
        base: Any = self.base
        weights = base.get_parameter(name).unbind(0)
        biases = base.get_parameter(f"{name}_bias").unbind(0) if base.has_bias else None
        applied = [branch.by_expert() for branch in self._of(name)] if name in self.branches else []
        parts = [
            _one_expert(part, weight.mT if base.is_transposed else weight, bias, applied, expert)
            for expert, (part, weight, bias) in enumerate(
                zip(torch.split(x, list(sizes)), weights, biases or [None] * len(weights), strict=True)
            )
            if len(part)
        ]
        return torch.cat(parts) if parts else x.new_zeros(0, _rows(weights[0], base.is_transposed))


def _one_expert(
    x: Tensor, weight_OI: Tensor, bias: Tensor | None, applied: Sequence[Applied], expert: int
) -> Tensor:
    out = linear(x, weight_OI, bias)
    for branch in applied:
        out = branch.add(out, x, expert)
    return out


def _rows(weight: Tensor, transposed: bool) -> int:  # noqa: FBT001 (one fact)
    return weight.shape[1] if transposed else weight.shape[0]
