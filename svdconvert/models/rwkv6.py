"""RWKV-6 ("Finch") as a PyTorch model that trains on any device; transformers has no such model.

Written from the equations of arXiv:2404.05892 and BlinkDL's parameters (see rwkv6_tensors.py). Modules
and parameters are named as in a .pth file. B: rows, T: tokens, C: width, H: heads, N: size of a head,
V: vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, silu
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.config.progress import report
from svdconvert.models import world_tokenizer
from svdconvert.models.rwkv6_tensors import MIX_ORDER, Sizes
from svdconvert.models.wkv6 import Form, wkv6
from svdconvert.models.world_tokenizer import WorldTokenizer

_EPSILON = 1e-5
_HEAD_EPSILON = 64e-5
"""The epsilon of the norm of every head: 1e-5 * 8^2 in every RWKV-6, for any head size."""

Memory = tuple[Tensor, Tensor, Tensor]
"""What a layer passes to the next token: the last input of its time mixing (B, C), the state S (B, H, N, N)
in float32, and the last input of its channel mixing (B, C)."""


@dataclass(frozen=True, slots=True)
class Output:
    """What the model returns."""

    logits: Tensor
    """(B, T, V)"""
    state: list[Memory]
    """The memory of every layer after the last token."""


class Config:
    """The part of a model's configuration that trainers use. It has no settings."""

    def get_text_config(self) -> "Config":
        """The configuration itself."""
        return self


def _vector(width: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, 1, width))


def _shifted(z_BTC: Tensor, last_BC: Tensor) -> Tensor:
    """The previous token's input minus the current one's, (B, T, C)."""
    return torch.cat([last_BC[:, None].to(z_BTC.dtype), z_BTC[:, :-1]], 1) - z_BTC


class TimeMixing(nn.Module):
    """The attention of a layer: a token reads from the state and writes to it."""

    ln_x: nn.GroupNorm
    time_maa_x: nn.Parameter
    time_state: nn.Parameter | None

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        inner = sizes.heads * sizes.head_size
        self.heads = sizes.heads
        self.size = sizes.head_size
        self.form: Form | None = None
        for letter in ("x", *MIX_ORDER):
            setattr(self, f"time_maa_{letter}", _vector(width))
        self.time_maa_w1 = nn.Parameter(torch.zeros(width, len(MIX_ORDER) * sizes.mix_rank))
        self.time_maa_w2 = nn.Parameter(torch.zeros(len(MIX_ORDER), sizes.mix_rank, width))
        self.time_decay = _vector(inner)
        self.time_decay_w1 = nn.Parameter(torch.zeros(width, sizes.decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.zeros(sizes.decay_rank, inner))
        self.time_faaaa = nn.Parameter(torch.zeros(sizes.heads, sizes.head_size))
        self.register_parameter("time_state", None)
        self.receptance, self.key, self.value, self.gate = (
            nn.Linear(width, inner, bias=False) for _ in range(4)
        )
        self.output = nn.Linear(inner, width, bias=False)
        self.ln_x = nn.GroupNorm(sizes.heads, inner, eps=_HEAD_EPSILON)

    def forward(self, z_BTC: Tensor, last_BC: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's contribution (B, T, C) to the residual stream, and the state after it."""
        w, k, v, r, g = self._mixed(z_BTC, _shifted(z_BTC, last_BC))
        low = torch.tanh(w @ self.time_decay_w1) @ self.time_decay_w2
        decay = -torch.exp(self.time_decay.float() + low.float())
        r = self.receptance(r)
        k = self.key(k)
        v = self.value(v)
        g = self.gate(g)
        r, k, v, decay = (self._by_head(x) for x in (r, k, v, decay))
        y, state = wkv6(r, k, v, decay, self.time_faaaa, state, self.form)
        y_XC = y.transpose(1, 2).reshape(-1, self.heads * self.size)
        weight = self.ln_x.weight.float()
        bias = self.ln_x.bias.float()
        normed = group_norm(y_XC, self.heads, weight, bias, self.ln_x.eps).reshape(g.shape).to(z_BTC.dtype)
        out: Tensor = self.output(normed * silu(g))
        return out, state

    def _mixed(self, z_BTC: Tensor, delta_BTC: Tensor) -> tuple[Tensor, ...]:
        """The five inputs, each a mixture of this token and the previous one; this one decides the shares."""
        batch, tokens, width = z_BTC.shape
        low = torch.tanh((z_BTC + delta_BTC * self.time_maa_x) @ self.time_maa_w1)
        low = low.view(batch * tokens, len(MIX_ORDER), -1).transpose(0, 1)
        shares = torch.bmm(low, self.time_maa_w2).view(-1, batch, tokens, width)
        return tuple(
            z_BTC + delta_BTC * (getattr(self, f"time_maa_{letter}") + share)
            for letter, share in zip(MIX_ORDER, shares, strict=True)
        )

    def _by_head(self, x_BTC: Tensor) -> Tensor:
        """(B, T, H N) -> (B, H, T, N)."""
        return x_BTC.reshape(*x_BTC.shape[:2], self.heads, self.size).transpose(1, 2)

    def first_state(self, batch: int) -> Tensor:
        """The initial state of a sequence: zeros, or the tuned state, which is stored as (H, v, k)."""
        if self.time_state is not None:
            return self.time_state.float().mT.expand(batch, -1, -1, -1)
        return self.time_faaaa.new_zeros(batch, self.heads, self.size, self.size, dtype=torch.float32)


class ChannelMixing(nn.Module):
    """The feed-forward part of a layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.time_maa_k = _vector(sizes.width)
        self.time_maa_r = _vector(sizes.width)
        self.key = nn.Linear(sizes.width, sizes.feed_forward, bias=False)
        self.receptance = nn.Linear(sizes.width, sizes.width, bias=False)
        self.value = nn.Linear(sizes.feed_forward, sizes.width, bias=False)

    def forward(self, z_BTC: Tensor, last_BC: Tensor) -> Tensor:
        """The layer's contribution (B, T, C) to the residual stream."""
        delta = _shifted(z_BTC, last_BC)
        key_BTF = self.key(z_BTC + delta * self.time_maa_k).relu().square()
        out: Tensor = self.receptance(z_BTC + delta * self.time_maa_r).sigmoid() * self.value(key_BTF)
        return out


class Block(nn.Module):
    """One layer; the first also has the norm after the embedding."""

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = (nn.LayerNorm(sizes.width, eps=_EPSILON) for _ in range(2))
        self.ln0 = nn.LayerNorm(sizes.width, eps=_EPSILON) if layer == 0 else None
        self.att = TimeMixing(sizes)
        self.ffn = ChannelMixing(sizes)

    def forward(self, h_BTC: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """(B, T, C) -> (B, T, C), and the memory for the next token."""
        if self.ln0 is not None:
            h_BTC = self.ln0(h_BTC)
        last_att, state, last_ffn = memory
        z = self.ln1(h_BTC)
        mixed, state = self.att(z, last_att, state)
        h_BTC = h_BTC + mixed
        z2 = self.ln2(h_BTC)
        return h_BTC + self.ffn(z2, last_ffn), (z[:, -1], state, z2[:, -1])


class Rwkv6(nn.Module):
    """A causal language model, with the interface that trainers of transformers' models call."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.config = Config()
        self.recomputes = False
        self.emb = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes, layer) for layer in range(sizes.layers))
        self.ln_out = nn.LayerNorm(sizes.width, eps=_EPSILON)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def gradient_checkpointing_enable(self, *_: object, **__: object) -> None:
        """Store only the layers' inputs, and recompute everything else in the backward pass."""
        self.recomputes = True

    def gradient_checkpointing_disable(self) -> None:
        """Store all activations for the backward pass."""
        self.recomputes = False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        state: list[Memory] | None = None,
        logits_to_keep: int = 0,
    ) -> Output:
        """Logits of `input_ids` (B, T), continuing from `state`.

        Only those of the last `logits_to_keep` tokens are computed, unless that is 0.
        Padding must be on the right; no other token depends on it there, so the mask is ignored. The state
        is reset at every token of a row whose position id is 0.
        """
        starts = None if position_ids is None else (position_ids == 0)
        after: list[Memory] = []
        if starts is not None and starts[:, 1:].any():
            hidden = self._hidden_of_packed(input_ids, starts)
        else:
            hidden, after = self._hidden(input_ids, state or self.first_state(len(input_ids)))
        return Output(self.head(self.ln_out(hidden[:, -logits_to_keep:])), after)

    def _hidden(self, ids_BT: Tensor, state: list[Memory]) -> tuple[Tensor, list[Memory]]:
        h_BTC: Tensor = self.emb(ids_BT)
        after: list[Memory] = []
        for block, memory in zip(self.blocks, state, strict=True):
            if self.recomputes and torch.is_grad_enabled():
                h_BTC, memory = checkpoint(block, h_BTC, memory, use_reentrant=False)
            else:
                h_BTC, memory = block(h_BTC, memory)
            after.append(memory)
        return h_BTC, after

    def _hidden_of_packed(self, ids_BT: Tensor, starts_BT: Tensor) -> Tensor:
        """The hidden states of rows that hold several texts, computed with one row per text."""
        starts_BT = starts_BT.clone()
        starts_BT[:, 0] = True
        firsts = starts_BT.flatten().nonzero().squeeze(1)
        lengths = firsts.diff(append=firsts.new_tensor([ids_BT.numel()])).tolist()
        rows = pad_sequence(list(torch.split(ids_BT.flatten(), lengths)), batch_first=True)
        hidden, _ = self._hidden(rows, self.first_state(len(rows)))
        texts = [row[:length] for row, length in zip(hidden, lengths, strict=True)]
        return torch.cat(texts).view(*ids_BT.shape, -1)

    def first_state(self, batch: int) -> list[Memory]:
        """The initial memory of every layer for `batch` sequences."""
        zeros = self.emb.weight.new_zeros(batch, self.sizes.width)
        return [(zeros, block.att.first_state(batch), zeros) for block in self._layers()]

    def tune_states(self) -> list[nn.Parameter]:
        """Give every layer a trainable initial state, zero if it has none; return the states."""
        shape = (self.sizes.heads, self.sizes.head_size, self.sizes.head_size)
        for block in self._layers():
            if block.att.time_state is None:
                block.att.time_state = nn.Parameter(torch.zeros(shape, device=self.emb.weight.device))
        return [block.att.time_state for block in self._layers() if block.att.time_state is not None]

    @contextmanager
    def computing(self, form: Form) -> Iterator[None]:
        """Compute the recurrence in one form, on any device and for any length."""
        for block in self._layers():
            block.att.form = form
        try:
            yield
        finally:
            for block in self._layers():
                block.att.form = None

    def _layers(self) -> Iterator[Block]:
        return (block for block in self.blocks if isinstance(block, Block))

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.emb.weight.device

    @torch.no_grad()
    def answer(
        self, prompt: Sequence[int], count: int, choose: Callable[[Tensor], int] | None = None, stop: int = 0
    ) -> Iterator[int]:
        """At most `count` tokens after `prompt`, up to but not including the token `stop`.

        `choose` picks a token from the logits (V,); by default the most likely one.
        """
        pick = choose or (lambda logits_V: int(logits_V.argmax()))
        tokens = list(prompt) or [stop]
        state = None
        for _ in range(count):
            output = self.forward(torch.tensor([tokens], device=self.device), state=state)
            token = pick(output.logits[0, -1])
            state = output.state
            if token == stop:
                return
            yield token
            tokens = [token]

    def generate(self, input_ids: Tensor, *, generation_config: Any, **_: object) -> Tensor:
        """(1, T) -> (1, T + tokens) by greedy decoding, with the signature of transformers' models."""
        limits = generation_config
        made = self.answer(input_ids[0].tolist(), limits.max_new_tokens, stop=limits.eos_token_id)
        return torch.cat([input_ids, input_ids.new_tensor([list(made)]).view(1, -1)], 1)


def load(family: TensorSource, dtype: torch.dtype | None = None) -> Rwkv6:
    """The model whose tensors have the family's canonical names, in `dtype` or as they are stored.

    Raises CheckpointError if the tensors disagree about its sizes.
    """
    with torch.device("meta"):
        model = Rwkv6(Sizes.of(family.infos))
    tensors = {}
    for done, name in enumerate(family.infos):
        report("load weights", done, len(family.infos), "tensors", name=name)
        tensors[name] = family.read(name)
    for name in [name for name in tensors if name.endswith(".time_state")]:
        model.get_submodule(name.rsplit(".", 1)[0]).time_state = nn.Parameter(tensors[name].float())
    cast = {name: tensor.to(dtype) if dtype else tensor for name, tensor in tensors.items()}
    model.load_state_dict(cast, assign=True)
    return model.eval()


def load_tokenizer(path: Path, family: TensorSource) -> WorldTokenizer:
    """The tokenizer in a model's directory or next to its file; see `world_tokenizer`."""
    return world_tokenizer.load_tokenizer(path, family.infos["emb.weight"].shape[0])
