"""Attention that keeps no scores: softmax(scale Q K^T) V for one block of queries after the other.

A block's scores stay in the processor's cache, and only those keys are read that one of its queries attends
to. The backward pass computes the scores again, so nothing but the inputs is saved for it (as in
FlashAttention, arXiv:2205.14135). The products have the dtype of the inputs and the softmax is in float32, as
in transformers' eager attention. For short rows in bfloat16 on a CPU this is faster than that and than
torch's fused attention.

B: rows, T: tokens, G: heads of keys, J: heads of queries per head of keys, D: size of a head of queries and
keys, E: size of a head of values, Q: queries of a block, K: keys of a block, N: J Q.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NAME = "svdconvert_blockwise"
"""The attention's name in transformers' registry."""
_SCORES = 2**19
"""Scores of a block: 2 MB in float32."""
_FEWEST = 32
"""Queries of a block, at least: products of fewer rows are slow."""
_NOT_COMPUTED = ("position_bias", "cache", "softcap", "s_aux")
"""Arguments of an attention of transformers that are left to its sdpa."""


def register_blockwise_attention() -> None:
    """Make the attention known to transformers by its name; its masks are those of sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """An attention of transformers: (B, GJ, T, D), (B, G, T, D), (B, G, T, E) -> (B, T, GJ, E) and no scores.

    What is not computed here, such as dropout, biases or fewer queries than keys, is left to sdpa.
    """
    is_square = query.shape[2] == key.shape[2] and query.shape[1] % key.shape[1] == 0
    is_special = arguments.get("dropout") or any(arguments.get(name) is not None for name in _NOT_COMPUTED)
    if is_special or not is_square or not _is_shared_by_heads(attention_mask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **arguments
        )
        return out
    is_causal = arguments.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    scale = arguments.get("scaling")
    if scale is None:
        scale = query.shape[-1] ** -0.5
    return blockwise_attention(query, key, value, attention_mask, scale, is_causal=bool(is_causal)), None


def _is_shared_by_heads(mask: Tensor | None) -> bool:
    return mask is None or (mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1)


def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, *, is_causal: bool
) -> Tensor:
    """(B, GJ, T, D), (B, G, T, D), (B, G, T, E) -> (B, T, GJ, E).

    `mask` is True for the keys that a query attends to: (B or 1, 1, T, T). Without a mask these are all, or
    those up to the query if `is_causal`. A query without any key attends to all keys of its block alike.
    Under autocast the inputs are cast to its dtype.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    rule = _Rule(mask, scale, is_causal)
    with torch.autocast(device, enabled=False):
        out: Tensor = _Blockwise.apply(query, key, value, rule)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True, slots=True)
class _Rule:
    """Which keys a query attends to, as in `blockwise_attention`, and the factor before the scores."""

    mask: Tensor | None
    scale: float
    is_causal: bool

    def blocks(self, query: Tensor, row: int) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """(queries, the keys that any of them attends to, which of the last of these each does not)."""
        _, heads, tokens, _ = query.shape
        size = max(_FEWEST, _SCORES // (heads * tokens))
        for start in range(0, tokens, size):
            queries = slice(start, min(start + size, tokens))
            if self.mask is not None:
                seen_QT = self.mask[row % len(self.mask), 0, queries]
                used = seen_QT.any(0).nonzero()
                keys = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, tokens)
                yield queries, keys, ~seen_QT[:, keys]
            elif self.is_causal:
                count = queries.stop - start
                hidden_QQ = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
                yield queries, slice(0, queries.stop), hidden_QQ
            else:
                yield queries, slice(0, tokens), None


class _Blockwise(torch.autograd.Function):
    """Saves its inputs only."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rule: _Rule) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.rule = rule
        rows, heads, tokens, _ = query.shape
        groups = key.shape[1]
        out = query.new_empty(rows, tokens, groups, heads // groups, value.shape[3])
        for row in range(rows):
            for queries, keys, hidden_QK in rule.blocks(query, row):
                query_GND = _grouped(query[row, :, queries], groups)
                p_GNK = _probabilities(query_GND, key[row, :, keys], hidden_QK, rule.scale)
                out_GNE = p_GNK.to(value.dtype) @ value[row, :, keys]
                shape = (groups, heads // groups, queries.stop - queries.start, -1)
                out[row, queries] = out_GNE.view(shape).permute(2, 0, 1, 3)
        return out.flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        rule = ctx.rule
        groups = key.shape[1]
        grad = grad.transpose(1, 2)
        wide = torch.promote_types(query.dtype, torch.float32)
        grad_query = torch.empty_like(query)
        # In float32, because several blocks add to the same keys.
        grad_key = torch.zeros_like(key, dtype=wide)
        grad_value = torch.zeros_like(value, dtype=wide)
        for row in range(len(query)):
            for queries, keys, hidden_QK in rule.blocks(query, row):
                query_GND = _grouped(query[row, :, queries], groups)
                grad_GNE = _grouped(grad[row, :, queries], groups)
                key_GKD = key[row, :, keys]
                p_GNK = _probabilities(query_GND, key_GKD, hidden_QK, rule.scale)
                grad_value[row, :, keys] += p_GNK.to(value.dtype).transpose(1, 2) @ grad_GNE
                grad_p = (grad_GNE @ value[row, :, keys].transpose(1, 2)).to(wide)
                # The derivative of the softmax: p grad_p - p (sum of p grad_p).
                grad_p *= p_GNK
                grad_p.addcmul_(p_GNK, grad_p.sum(2, keepdim=True), value=-1.0)
                grad_scores = grad_p.to(query.dtype)
                shape = (query.shape[1], queries.stop - queries.start, -1)
                grad_query[row, :, queries] = (grad_scores @ key_GKD).view(shape)
                grad_key[row, :, keys] += grad_scores.transpose(1, 2) @ query_GND
        # The scale comes last: there are fewer numbers here than scores.
        grad_query *= rule.scale
        grad_key *= rule.scale
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None


def _grouped(block: Tensor, groups: int) -> Tensor:
    """(GJ, Q, D) -> (G, N, D)."""
    heads, queries, size = block.shape
    return block.reshape(groups, heads // groups * queries, size)


def _probabilities(query_GND: Tensor, key_GKD: Tensor, hidden_QK: Tensor | None, scale: float) -> Tensor:
    """The softmax over the keys in float32, or in float64 for such inputs: (G, N, K)."""
    scores = query_GND @ key_GKD.transpose(1, 2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scale)
    if hidden_QK is not None:
        queries, count = hidden_QK.shape
        by_head = scores.view(len(scores), -1, queries, scores.shape[2])
        by_head[..., -count:].masked_fill_(hidden_QK, torch.finfo(scores.dtype).min)
    return scores.softmax(2)
