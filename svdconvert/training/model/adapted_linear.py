"""A frozen linear layer with an adapter beside it.  O: out features, I: in features, R: rank.

    y = base(x) + scale * B core A x

computed from right to left, so that nothing as large as the base's own weight is ever built. Where A is
frozen (LoRA-FA, LoRA-XS) the backward pass needs A x and not x: R numbers a token in place of I.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from svdconvert.linalg.factors import Factors


class AdaptedLinear(nn.Module):
    """`base`, frozen, plus scale * the factors, of which `trains` are trained.

    The pieces are float32: lora_A (R, I), lora_B (O, R) and, where there is a core, lora_S (R,) or
    lora_R (R, R). The trained ones are parameters, the others buffers. They live where the base's
    weight does. `corrected` is for a trained B beside a frozen A: its gradient becomes what moves the
    product B A most like the gradient of the whole matrix would.
    """

    def __init__(  # noqa: PLR0913 (what it is made of, and how it is trained)
        self,
        base: nn.Linear,
        factors: Factors,
        scale: float,
        trains: frozenset[str],
        dropout: float = 0.0,
        *,
        corrected: bool = False,
    ) -> None:
        super().__init__()
        self.name = ""
        """What its adapter calls it."""
        self.base = base.requires_grad_(False)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        pieces = factors.pieces()
        assert trains <= pieces.keys(), f"{sorted(trains)} are to be trained, there are {sorted(pieces)}"
        self._pieces = tuple(pieces)
        for name, piece in pieces.items():
            # A copy, because training writes to it; contiguous, because a piece may be a slice or a
            # transpose of what an SVD returned, and the products are several times slower on those.
            own = piece.detach().to(base.weight.device, torch.float32, copy=True).contiguous()
            if name in trains:
                self.register_parameter(name, nn.Parameter(own))
            else:
                self.register_buffer(name, own)
        if corrected:
            _correct(self.get("lora_B"), self.get("lora_A"), scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O) in the dtype of the base's output.

        Under autocast the adapter computes in autocast's dtype, otherwise in float32.
        """
        out: Tensor = self.base(x)
        low, left = self._through_core(self._down(x)), self.get("lora_B")
        if low.dtype != out.dtype:
            # The sum before the cast: one rounding to the base's dtype, not two.
            return (out + self.scale * linear(low, left)).to(out.dtype)
        # One kernel, which rounds once as well, and nothing as large as the output beside it.
        sum_NO = torch.addmm(
            out.reshape(-1, out.shape[-1]), low.reshape(-1, low.shape[-1]), left.T, alpha=self.scale
        )
        return sum_NO.view_as(out)

    @property
    def has_spectrum(self) -> bool:
        """True where singular values stand between the sides, apart from them."""
        return "lora_S" in self._pieces

    def _down(self, x: Tensor) -> Tensor:
        """A x, with dropout before it."""
        right = self.get("lora_A")
        if not right.requires_grad:
            rate = self.dropout.p if self.dropout.training else 0.0
            # A seed and not a mask is kept for the backward pass; it comes from torch's own generator.
            seed = int(torch.randint(2**62, ())) if rate else 0
            low: Tensor = _FrozenDown.apply(x, right, rate, seed)  # type: ignore[no-untyped-call]
            return low
        return linear(self.dropout(x if torch.is_autocast_enabled(x.device.type) else x.float()), right)

    def _through_core(self, low: Tensor) -> Tensor:
        if self.has_spectrum:
            # Multiplied in float32; the next product would round it to autocast's dtype in any case.
            return (low * self.get("lora_S")).to(low.dtype)
        return linear(low, self.get("lora_R")) if "lora_R" in self._pieces else low

    def get(self, piece: str) -> Tensor:
        """The live tensor of a piece, by its name in an adapter file."""
        tensor = getattr(self, piece)
        assert isinstance(tensor, Tensor)
        return tensor

    def pieces_now(self) -> Factors:
        """The live pieces, where they are."""
        return Factors.of({name: self.get(name).detach() for name in self._pieces})

    def factors(self) -> Factors:
        """The pieces as they are now: a float32 copy on the CPU that further training does not touch."""
        return Factors.of(
            {name: self.get(name).detach().to("cpu", torch.float32, copy=True) for name in self._pieces}
        )

    def extra_repr(self) -> str:
        """The rank, the scale and the trained pieces, for torch's printout of a model."""
        trained = [name for name, _ in self.named_parameters(recurse=False)]
        return f"rank={self.get('lora_A').shape[0]}, scale={self.scale:g}, trains={', '.join(trained)}"


class _FrozenDown(torch.autograd.Function):
    """A x of a frozen A, with dropout before it: nothing but A and a seed is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, right_RI: Tensor, rate: float, seed: int) -> Tensor:
        ctx.save_for_backward(right_RI)
        ctx.rate, ctx.seed, ctx.dtype = rate, seed, x.dtype
        # Autocast chooses the dtype of the product where it is on.
        wide = x if torch.is_autocast_enabled(x.device.type) else x.float()
        return linear(wide * _kept(wide, rate, seed) if rate else wide, right_RI)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (right_RI,) = ctx.saved_tensors
        slope = grad @ right_RI.to(grad.dtype)
        slope = slope * _kept(slope, ctx.rate, ctx.seed) if ctx.rate else slope
        return slope.to(ctx.dtype), None, None, None


def _kept(like: Tensor, rate: float, seed: int) -> Tensor:
    """Dropout's mask for a tensor like this: 0, or 1 / (1 - rate); the same for the same seed."""
    generator = torch.Generator(like.device).manual_seed(seed)
    mask = torch.empty_like(like, dtype=torch.float32).bernoulli_(1.0 - rate, generator=generator)
    return mask.div_(1.0 - rate).to(like.dtype)


def _correct(left_OR: Tensor, right_RI: Tensor, scale: float) -> None:
    """Turn every gradient g of B into g (scale^2 A A^T)^-1 (LoRA-FA's second version, arXiv:2308.03303v2).

    That is the least-squares solution of scale * dB A = dW for dW the gradient of the whole matrix. Being
    linear it may be done a backward pass at a time.
    """
    inverse_RR = torch.linalg.pinv((right_RI.double() @ right_RI.double().T) * scale**2, hermitian=True)
    inverse_RR = inverse_RR.to(left_OR.dtype)
    left_OR.register_hook(  # type: ignore[no-untyped-call]
        lambda gradient: gradient @ inverse_RR.to(gradient.device)
    )
