"""The recurrence of RWKV-6, token by token and in chunks.

For every head, with the state S (N, N) and the log-decay a <= 0 of every key channel:

    y_t = r_t (diag(u) k_t v_t^T + S_{t-1})        S_t = diag(exp a_t) S_{t-1} + k_t v_t^T

B: rows, H: heads, T: tokens, N: size of a head (keys first, values last), M: tokens of a chunk,
J: chunks, Z: chunks of all heads. Source: arXiv:2404.05892, section 4 and appendix.

In chunks, the state is updated once in M tokens, and the M x M scores within a chunk,

    P[t, i] = sum_n r_t[n] k_i[n] exp(a_{i+1}[n] + ... + a_{t-1}[n])    for i < t,

become matrix products. Factoring the exponential into exp(A_t) exp(-A_i) overflows and underflows, because a
reaches -30 in trained models; the usual remedy, a lower bound on a, changes the result. Both forms here are
correct for every a <= 0.

`doubled` joins two adjacent runs of tokens, 1 and 2, into one of twice the length. R is the r of a run,
decayed from the beginning of the run, K its k, decayed to the end of the run, and D its total decay. A single
token has R = r, K = k, D = exp a and P = 0, and two runs have

    P = [[P1, 0], [R2 K1^T, P2]]    R = [R1, R2 D1]    K = [K1 D2, K2]    D = D1 D2

so log2(M) steps make the chunk. Every factor is a product of decays between 0 and 1: nothing overflows,
nothing cancels, and what underflows is zero in float32 in any case. `exact` sums every exponent separately.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A way to compute the recurrence: (r, k, v, a, u, state) -> (y, state), all float32."""

_SHORT = 8  # fewer tokens are faster without chunks


def wkv6(  # noqa: PLR0913 (the formula has these six)
    r: Tensor, k: Tensor, v: Tensor, a: Tensor, u_HN: Tensor, state: Tensor, form: Form | None = None
) -> tuple[Tensor, Tensor]:
    """y (B, H, T, N) and the state after it (B, H, N, N), both float32.

    r, k, v, a are (B, H, T, N). Without a `form`, short sequences are computed token by token and others in
    the form that is fastest on the device.
    """
    if form is None:
        form = token_by_token if r.shape[2] < _SHORT else form_for(r.device)
    # Autocast would compute these products in bfloat16, which is not accurate enough.
    with torch.autocast(r.device.type, enabled=False):
        return form(r.float(), k.float(), v.float(), a.float(), u_HN.float(), state.float())


def token_by_token(  # noqa: PLR0913
    r: Tensor, k: Tensor, v: Tensor, a: Tensor, u_HN: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence as defined."""
    outputs = []
    for r_t, k_t, v_t, decay_t in zip(*(x.unbind(2) for x in (r, k, v, a.exp())), strict=True):
        update = k_t[..., :, None] @ v_t[..., None, :]
        outputs.append((r_t[..., None, :] @ (u_HN[..., None] * update + state)).squeeze(-2))
        state = update + decay_t[..., None] * state
    return torch.stack(outputs, 2), state


class Inside(NamedTuple):
    """What a chunk computes independently of the others."""

    scores: Tensor
    """P with zeros on its diagonal and above, (Z, M, M)."""
    reads: Tensor
    """R: what reads the state before the chunk, (Z, M, N)."""
    writes: Tensor
    """K: what the chunk adds to the state, (Z, M, N)."""
    decay: Tensor
    """D: the factor by which the chunk decays the state, (Z, N)."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """The recurrence in chunks: a Form."""

    inside: Callable[[Tensor, Tensor, Tensor], Inside]
    """(r, k, a), each (Z, M, N)."""
    size: int
    """M, tokens of a chunk."""

    def __call__(  # noqa: PLR0913
        self, r: Tensor, k: Tensor, v: Tensor, a: Tensor, u_HN: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `token_by_token`, except for rounding."""
        batch, heads, tokens, size = r.shape
        current = (r * (k * u_HN[:, None])).sum(-1, keepdim=True)
        r, k, v, a, current = (self._cut(x) for x in (r, k, v, a, current))
        scores, reads, writes, decay = self.inside(r, k, a)
        # A token reads its own update through u.
        scores.diagonal(0, 1, 2).copy_(current.squeeze(-1))
        updates = (writes.mT @ v).view(batch, heads, -1, size, size)
        decays = decay.view(batch, heads, -1, size, 1)
        states = [state]
        for left, update in zip(decays.unbind(2), updates.unbind(2), strict=True):
            states.append(torch.addcmul(update, left, states[-1]))
        before = torch.stack(states[:-1], 2).flatten(0, 2)
        y = torch.baddbmm(scores @ v, reads, before)
        return y.view(batch, heads, -1, size)[:, :, :tokens], states[-1]

    def _cut(self, x: Tensor) -> Tensor:
        """(B, H, T, N) -> (Z, M, N), padded."""
        if missing := -x.shape[2] % self.size:
            # Zeros at the end neither add to the state (k = 0) nor decay it (a = 0).
            x = pad(x, (0, 0, 0, missing))
        return x.reshape(-1, self.size, x.shape[-1])


def doubled(r: Tensor, k: Tensor, a: Tensor) -> Inside:
    """By joining runs of 1, 2, 4, ... tokens; M is a power of two."""
    chunks, size, channels = r.shape
    scores = r.new_zeros(chunks, size, size)
    reads, writes, decay = (x.reshape(-1, 1, channels) for x in (r, k, a.exp()))
    run = 1
    while run < size:
        (r1, r2), (k1, k2), (d1, d2) = (_pairs(x) for x in (reads, writes, decay))
        _below_diagonal(scores, run).copy_((r2 @ k1.mT).view(chunks, -1, run, run))
        run *= 2
        if torch.is_grad_enabled() or run == 2:
            reads = torch.cat([r1, r2 * d1], 1)
            writes = torch.cat([k1 * d2, k2], 1)
        else:
            # In place, a sixth faster: no gradient needs the old values, and no caller holds these tensors.
            r2.mul_(d1)
            k1.mul_(d2)
            reads, writes = (x.view(-1, run, channels) for x in (reads, writes))
        decay = d1 * d2
    return Inside(scores, reads, writes, decay.squeeze(1))


def _pairs(x: Tensor) -> tuple[Tensor, ...]:
    """The first and the second of every pair."""
    return x.view(-1, 2, *x.shape[1:]).unbind(1)


def _below_diagonal(scores: Tensor, run: int) -> Tensor:
    """The blocks (Z, M / 2 run, run, run) of rows of every second run and columns of the run before it."""
    pairs = scores.shape[-1] // (2 * run)
    blocks = scores.view(-1, pairs, 2, run, pairs, 2, run).diagonal(0, 1, 4)
    return blocks[:, 1, :, 0].movedim(-1, 1)


def exact(r: Tensor, k: Tensor, a: Tensor) -> Inside:
    """From every exponent (Z, M, M, N) separately; recomputed in the backward pass, not stored."""
    scores: Tensor = checkpoint(_exact_scores, r, k, a, use_reentrant=False)
    until = a.cumsum(-2)
    after = pad(a[:, 1:].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))
    return Inside(scores, r * _exclusive(until).exp(), k * after.exp(), until[:, -1].exp())


def _exclusive(until: Tensor) -> Tensor:
    """a_1 + ... + a_{t-1} of the sums up to t: shifted, not subtracted, which would cancel."""
    return pad(until[:, :-1], (0, 0, 1, 0))


def _exact_scores(r: Tensor, k: Tensor, a: Tensor) -> Tensor:
    size = a.shape[1]
    below = torch.ones(size, size, dtype=torch.bool, device=a.device).tril(-1)
    # Row t, column i of the sum over rows: a_{i+1} + ... + a_{t-1}.
    later = _exclusive(a)[:, :, None, :].expand(-1, -1, size, -1)
    counted = pad(below[:-1], (0, 0, 1, 0))
    exponents = later.masked_fill(~counted[..., None], 0.0).cumsum(-3)
    exponents = exponents.masked_fill(~below[..., None], -torch.inf)
    return torch.einsum("ztn,zin,ztin->zti", r, k, exponents.exp())


WIDE = Chunks(doubled, 32)
"""The fastest on CPUs: little arithmetic except matrix products, in about forty small steps."""
EXACT = Chunks(exact, 16)
"""For GPUs, which have the memory bandwidth, and on which every small step costs a kernel launch."""


def form_for(device: torch.device) -> Form:
    """The faster of the two on a device."""
    return WIDE if device.type == "cpu" else EXACT
