"""RWKV-6 ("Finch") as a PyTorch model that trains on any device; transformers has none.

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
from svdconvert.models import world_tokenizer
from svdconvert.models.rwkv6_tensors import MIX_ORDER, Sizes
from svdconvert.models.wkv6 import Form, wkv6
from svdconvert.models.world_tokenizer import WorldTokenizer

_EPSILON = 1e-5
_HEAD_EPSILON = 64e-5
"""Of the norm of every head: 1e-5 * 8^2 in every RWKV-6, whatever the size of its heads."""

Memory = tuple[Tensor, Tensor, Tensor]
"""What a layer carries on: its two last inputs (B, C), and between them S (B, H, N, N) in float32."""


@dataclass(frozen=True, slots=True)
class Output:
    """What the model says."""

    logits: Tensor
    """(B, T, V)"""
    state: list[Memory]
    """Of every layer, behind the last token."""


class Config:
    """What trainers ask a model's configuration: nothing here can be configured."""

    def get_text_config(self) -> "Config":
        """This."""
        return self


def _vector(width: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, 1, width))


def _shifted(z_BTC: Tensor, last_BC: Tensor) -> Tensor:
    """What stood one token before, less what stands there now."""
    return torch.cat([last_BC[:, None].to(z_BTC.dtype), z_BTC[:, :-1]], 1) - z_BTC


class TimeMixing(nn.Module):
    """The attention of a layer: what a token takes up from the state, and leaves in it."""

    ln_x: nn.GroupNorm
    time_maa_x: nn.Parameter
    time_state: nn.Parameter | None

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, inner = sizes.width, sizes.heads * sizes.head_size
        self.heads, self.size = sizes.heads, sizes.head_size
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
        """The layer's part of the sum (B, T, C), and the state behind it."""
        w, k, v, r, g = self._mixed(z_BTC, _shifted(z_BTC, last_BC))
        low = torch.tanh(w @ self.time_decay_w1) @ self.time_decay_w2
        decay = -torch.exp(self.time_decay.float() + low.float())
        r, k, v, g = self.receptance(r), self.key(k), self.value(v), self.gate(g)
        r, k, v, decay = (self._by_head(x) for x in (r, k, v, decay))
        y, state = wkv6(r, k, v, decay, self.time_faaaa, state, self.form)
        y_XC = y.transpose(1, 2).reshape(-1, self.heads * self.size)
        weight, bias = self.ln_x.weight.float(), self.ln_x.bias.float()
        normed = group_norm(y_XC, self.heads, weight, bias, self.ln_x.eps).reshape(g.shape).to(z_BTC.dtype)
        out: Tensor = self.output(normed * silu(g))
        return out, state

    def _mixed(self, z_BTC: Tensor, delta_BTC: Tensor) -> tuple[Tensor, ...]:
        """The five inputs, each between this token and the last, as the token itself decides."""
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
        """What a sequence begins with: zeros, or the tuned state, which is stored (H, v, k)."""
        if self.time_state is not None:
            return self.time_state.float().mT.expand(batch, -1, -1, -1)
        return self.time_faaaa.new_zeros(batch, self.heads, self.size, self.size, dtype=torch.float32)


class ChannelMixing(nn.Module):
    """The feed-forward part of a layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.time_maa_k, self.time_maa_r = _vector(sizes.width), _vector(sizes.width)
        self.key = nn.Linear(sizes.width, sizes.feed_forward, bias=False)
        self.receptance = nn.Linear(sizes.width, sizes.width, bias=False)
        self.value = nn.Linear(sizes.feed_forward, sizes.width, bias=False)

    def forward(self, z_BTC: Tensor, last_BC: Tensor) -> Tensor:
        """The layer's part of the sum (B, T, C)."""
        delta = _shifted(z_BTC, last_BC)
        key_BTF = self.key(z_BTC + delta * self.time_maa_k).relu().square()
        out: Tensor = self.receptance(z_BTC + delta * self.time_maa_r).sigmoid() * self.value(key_BTF)
        return out


class Block(nn.Module):
    """One layer; the first also has the norm behind the embedding."""

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = (nn.LayerNorm(sizes.width, eps=_EPSILON) for _ in range(2))
        self.ln0 = nn.LayerNorm(sizes.width, eps=_EPSILON) if layer == 0 else None
        self.att, self.ffn = TimeMixing(sizes), ChannelMixing(sizes)

    def forward(self, h_BTC: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """(B, T, C) -> (B, T, C), and what is carried on."""
        if self.ln0 is not None:
            h_BTC = self.ln0(h_BTC)
        last_att, state, last_ffn = memory
        z = self.ln1(h_BTC)
        mixed, state = self.att(z, last_att, state)
        h_BTC = h_BTC + mixed
        z2 = self.ln2(h_BTC)
        return h_BTC + self.ffn(z2, last_ffn), (z[:, -1], state, z2[:, -1])


class Rwkv6(nn.Module):
    """A causal language model; `forward` is what a trainer for transformers' models calls."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, self.config, self.recomputes = sizes, Config(), False
        self.emb = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes, layer) for layer in range(sizes.layers))
        self.ln_out = nn.LayerNorm(sizes.width, eps=_EPSILON)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def gradient_checkpointing_enable(self, *_: object, **__: object) -> None:
        """Keep only what goes from layer to layer, and compute the rest again for the gradient."""
        self.recomputes = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything for the gradient."""
        self.recomputes = False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        state: list[Memory] | None = None,
    ) -> Output:
        """Logits of `input_ids` (B, T), going on from `state`.

        Padding belongs to the right, where nothing depends on it, so the mask is not looked at. Where
        `position_ids` begin anew, in the middle of a row, so does the state.
        """
        starts = None if position_ids is None else (position_ids == 0)
        after: list[Memory] = []
        if starts is not None and starts[:, 1:].any():
            hidden = self._several(input_ids, starts)
        else:
            hidden, after = self._hidden(input_ids, state or self.first_state(len(input_ids)))
        return Output(self.head(self.ln_out(hidden)), after)

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

    def _several(self, ids_BT: Tensor, starts_BT: Tensor) -> Tensor:
        """Rows of several texts, each text as a row of its own, and back."""
        starts_BT = starts_BT.clone()
        starts_BT[:, 0] = True
        firsts = starts_BT.flatten().nonzero().squeeze(1)
        lengths = firsts.diff(append=firsts.new_tensor([ids_BT.numel()])).tolist()
        rows = pad_sequence(list(torch.split(ids_BT.flatten(), lengths)), batch_first=True)
        hidden, _ = self._hidden(rows, self.first_state(len(rows)))
        texts = [row[:length] for row, length in zip(hidden, lengths, strict=True)]
        return torch.cat(texts).view(*ids_BT.shape, -1)

    def first_state(self, batch: int) -> list[Memory]:
        """What a sequence begins with."""
        zeros = self.emb.weight.new_zeros(batch, self.sizes.width)
        return [(zeros, block.att.first_state(batch), zeros) for block in self._layers()]

    def tune_states(self) -> list[nn.Parameter]:
        """Give every layer a first state to be trained, at zero where it has none."""
        shape = (self.sizes.heads, self.sizes.head_size, self.sizes.head_size)
        for block in self._layers():
            if block.att.time_state is None:
                block.att.time_state = nn.Parameter(torch.zeros(shape, device=self.emb.weight.device))
        return [block.att.time_state for block in self._layers() if block.att.time_state is not None]

    @contextmanager
    def computing(self, form: Form) -> Iterator[None]:
        """The recurrence in one form, whatever the device and the length."""
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
        """Where it computes."""
        return self.emb.weight.device

    @torch.no_grad()
    def answer(
        self, prompt: Sequence[int], count: int, choose: Callable[[Tensor], int] | None = None, stop: int = 0
    ) -> Iterator[int]:
        """At most `count` tokens after `prompt`, up to the token `stop`, which is not given.

        `choose` picks a token from the logits (V,): the likeliest unless given.
        """
        pick = choose or (lambda logits_V: int(logits_V.argmax()))
        tokens, state = list(prompt) or [stop], None
        for _ in range(count):
            output = self.forward(torch.tensor([tokens], device=self.device), state=state)
            token, state = pick(output.logits[0, -1]), output.state
            if token == stop:
                return
            yield token
            tokens = [token]

    def generate(self, input_ids: Tensor, *, generation_config: Any, **_: object) -> Tensor:
        """(1, T) -> (1, T + tokens), the likeliest ones, as transformers' models are asked."""
        limits = generation_config
        made = self.answer(input_ids[0].tolist(), limits.max_new_tokens, stop=limits.eos_token_id)
        return torch.cat([input_ids, input_ids.new_tensor([list(made)]).view(1, -1)], 1)


def load(family: TensorSource, dtype: torch.dtype | None = None) -> Rwkv6:
    """The model of tensors under the family's own names, in `dtype` or as they are stored.

    Raises CheckpointError where the tensors disagree about its sizes.
    """
    with torch.device("meta"):
        model = Rwkv6(Sizes.of(family.infos))
    tensors = {name: family.read(name) for name in family.infos}
    for name in [name for name in tensors if name.endswith(".time_state")]:
        model.get_submodule(name.rsplit(".", 1)[0]).time_state = nn.Parameter(tensors[name].float())
    cast = {name: tensor.to(dtype) if dtype else tensor for name, tensor in tensors.items()}
    model.load_state_dict(cast, assign=True)
    return model.eval()


def load_tokenizer(place: Path, family: TensorSource) -> WorldTokenizer:
    """The tokenizer in a model's directory or next to its file; see `world_tokenizer`."""
    return world_tokenizer.load_tokenizer(place, family.infos["emb.weight"].shape[0])
