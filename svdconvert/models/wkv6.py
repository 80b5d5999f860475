"""The recurrence of RWKV-6, one token after another and by chunks.

For every head, with the state S (N, N) and the log-decay a <= 0 of every key channel:

    y_t = r_t (diag(u) k_t v_t^T + S_{t-1})        S_t = diag(exp a_t) S_{t-1} + k_t v_t^T

B: rows, H: heads, T: tokens, N: size of a head (keys first, values last), M: tokens of a chunk,
J: chunks. Source: arXiv:2404.05892, section 4 and appendix.

By chunks the state moves once in M tokens, and the M x M scores inside a chunk,

    P[t, i] = sum_n r_t[n] k_i[n] exp(a_{i+1}[n] + ... + a_{t-1}[n])    for i < t,

become matrix products. Taking exp(A_t) exp(-A_i) apart over- and underflows, for a reaches -30 in trained
models. Both forms here are safe for every a: `factored_scores` takes them apart about the middle of the
chunk, where a floor far below rounding bounds both exponents; `exact_scores` never takes them apart.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

_FLOOR = -20.0  # exp of it is 2e-9, below float32's rounding of what it is added to

Scores = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(r, k, a), each (..., M, N) -> P without its diagonal, (..., M, M)."""

Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A way to compute the recurrence: (r, k, v, a, u, state) -> (y, state), all float32."""

_SHORT = 16  # tokens up to which a chunk costs more than it saves


def wkv6(  # noqa: PLR0913 (the formula has these six)
    r: Tensor, k: Tensor, v: Tensor, a: Tensor, u_HN: Tensor, state: Tensor, form: Form | None = None
) -> tuple[Tensor, Tensor]:
    """y (B, H, T, N) and the state behind it (B, H, N, N), both float32.

    r, k, v, a are (B, H, T, N). Without a `form` short sequences go token by token, others as is best for
    the device.
    """
    if form is None:
        form = token_by_token if r.shape[2] < _SHORT else form_for(r.device)
    # Under autocast the products would be bf16, of what may not be.
    with torch.autocast(r.device.type, enabled=False):
        return form(r.float(), k.float(), v.float(), a.float(), u_HN.float(), state.float())


def token_by_token(  # noqa: PLR0913
    r: Tensor, k: Tensor, v: Tensor, a: Tensor, u_HN: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is defined."""
    outputs = []
    for r_t, k_t, v_t, decay_t in zip(*(x.unbind(2) for x in (r, k, v, a.exp())), strict=True):
        update = k_t[..., :, None] @ v_t[..., None, :]
        outputs.append((r_t[..., None, :] @ (u_HN[..., None] * update + state)).squeeze(-2))
        state = update + decay_t[..., None] * state
    return torch.stack(outputs, 2), state


@dataclass(frozen=True, slots=True)
class Chunks:
    """The same by chunks: a Form."""

    scores: Scores
    size: int
    """M, tokens of a chunk."""

    def __call__(  # noqa: PLR0913
        self, r: Tensor, k: Tensor, v: Tensor, a: Tensor, u_HN: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `token_by_token`, to rounding."""
        tokens = r.shape[2]
        # What fills up the last chunk neither adds to the state (k = 0) nor decays it (a = 0).
        r, k, v, a = (self._cut(x) for x in (r, k, v, a))
        until = a.cumsum(-2)
        scores = self.scores(r, k, a) + torch.diag_embed((r * u_HN[:, None, None] * k).sum(-1))
        # What goes through the state has exponents of at most 0, and no need of care.
        updates = (k * _sum_after(a).exp()).mT @ v
        states = [state]
        for decay, update in zip(until[..., -1, :].exp().unbind(2), updates.unbind(2), strict=True):
            states.append(torch.addcmul(update, decay[..., None], states[-1]))
        y = scores @ v + (r * _exclusive(until).exp()) @ torch.stack(states[:-1], 2)
        return y.flatten(2, 3)[:, :, :tokens], states[-1]

    def _cut(self, x: Tensor) -> Tensor:
        """(B, H, T, N) -> (B, H, J, M, N), with zeros at the end."""
        batch, heads, tokens, size = x.shape
        return pad(x, (0, 0, 0, -tokens % self.size)).reshape(batch, heads, -1, self.size, size)


def _exclusive(until: Tensor) -> Tensor:
    """a_1 + ... + a_{t-1} of the sums up to t: shifted, not subtracted, which would cancel."""
    return pad(until[..., :-1, :], (0, 0, 1, 0))


def _sum_after(a: Tensor) -> Tensor:
    """a_{i+1} + ... + a_M for every i."""
    return pad(a[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))


def factored_scores(r: Tensor, k: Tensor, a: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """P as a product of two matrices in `dtype`.

    Exponents stay within 20 M / 2: M is at most 8 in float32 and 64 in float64.
    """
    size = a.shape[-2]
    until = a.to(dtype).clamp(min=_FLOOR).cumsum(-2)
    before = _exclusive(until)
    middle = before[..., size // 2 : size // 2 + 1, :]
    product = (r * (before - middle).exp()) @ (k * (middle - until).exp()).mT
    # Filled, not multiplied: above the diagonal the product may be infinite.
    return product.masked_fill(~_below(size, a.device), 0.0).to(r.dtype)


def exact_scores(r: Tensor, k: Tensor, a: Tensor) -> Tensor:
    """P from every exponent (..., M, M, N) by itself; computed again for the gradient, not kept."""
    scores: Tensor = checkpoint(_exact_scores, r, k, a, use_reentrant=False)
    return scores


def _exact_scores(r: Tensor, k: Tensor, a: Tensor) -> Tensor:
    size = a.shape[-2]
    below = _below(size, a.device)
    # Row t, column i of the sum over rows: a_{i+1} + ... + a_{t-1}.
    later = _exclusive(a)[..., :, None, :].expand(*a.shape[:-1], size, a.shape[-1])
    counted = pad(below[:-1], (0, 0, 1, 0))
    exponents = later.masked_fill(~counted[..., None], 0.0).cumsum(-3)
    exponents = exponents.masked_fill(~below[..., None], -torch.inf)
    return torch.einsum("...tn,...in,...tin->...ti", r, k, exponents.exp())


def _below(size: int, device: torch.device) -> Tensor:
    """True below the diagonal."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(-1)


WIDE = Chunks(factored_scores, 64)
"""Long chunks with scores in float64: the fastest on CPUs, whose float64 is half as fast as their float32."""
EXACT = Chunks(exact_scores, 16)
"""For GPUs, whose float64 is slow, and which have the memory bandwidth."""


def form_for(device: torch.device) -> Form:
    """The faster of the two on a device."""
    return WIDE if device.type == "cpu" else EXACT
