"""A frozen linear layer plus a low-rank adapter.  O: out features, I: in features, R: rank.

    y = base(x) + scale * B core A x

computed from right to left, so that no (O, I) matrix is ever built. If A is frozen (LoRA-FA, LoRA-XS) the
backward pass needs A x instead of x: R values per token instead of I (LoRA-FA, arXiv:2308.03303).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from svdconvert.linalg.factors import Factors
from svdconvert.training.model.quantised_linear import device_of


class AdaptedLinear(nn.Module):
    """The frozen layer `base` plus scale * the factors, of which those named in `trains` are trained.

    The factors are float32 on the device of the base's weight: lora_A (R, I), lora_B (O, R) and, if there
    is a core, lora_S (R,) or lora_R (R, R). Trained factors are parameters, the others buffers.

    `corrected` is for a trained B with a frozen A: the gradient of B becomes the one for which the change of
    the product B A is closest to the gradient of the full matrix.
    """

    def __init__(  # noqa: PLR0913 (what it consists of, and how it is trained)
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
        """The name of the module in the adapter's file."""
        self.base = base.requires_grad_(False)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        tensors = factors.pieces()
        assert trains <= tensors.keys(), f"cannot train {sorted(trains)}: the factors are {sorted(tensors)}"
        self._factor_names = tuple(tensors)
        device = device_of(base)
        for name, tensor in tensors.items():
            # A copy, because training modifies it. Contiguous, because a factor may be a slice or a transpose
            # of an SVD's output, with which the products are several times slower.
            own = tensor.detach().to(device, torch.float32, copy=True).contiguous()
            if name in trains:
                self.register_parameter(name, nn.Parameter(own))
            else:
                self.register_buffer(name, own)
        if corrected:
            correct_gradient(self.factor("lora_B"), self.factor("lora_A"), scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O) in the dtype of the base's output.

        The adapter computes in autocast's dtype under autocast, otherwise in float32.
        """
        out: Tensor = self.base(x)
        low = self._apply_core(self._project_down(x))
        left_OR = self.factor("lora_B")
        if low.dtype != out.dtype:
            # Add before casting: one rounding to the base's dtype instead of two.
            return (out + self.scale * linear(low, left_OR)).to(out.dtype)
        # A single kernel, which also rounds once, and needs no second tensor of the size of the output.
        sum_NO = torch.addmm(
            out.reshape(-1, out.shape[-1]), low.reshape(-1, low.shape[-1]), left_OR.T, alpha=self.scale
        )
        return sum_NO.view_as(out)

    @property
    def has_singular_values(self) -> bool:
        """True if the core is a vector of singular values (SORSA)."""
        return "lora_S" in self._factor_names

    def _project_down(self, x: Tensor) -> Tensor:
        """A x, with dropout on x."""
        right_RI = self.factor("lora_A")
        if not right_RI.requires_grad:
            rate = self.dropout.p if self.dropout.training else 0.0
            # The backward pass regenerates the mask from a seed, drawn from torch's default generator.
            seed = int(torch.randint(2**62, ())) if rate else 0
            low: Tensor = _FrozenProjection.apply(x, right_RI, rate, seed)  # type: ignore[no-untyped-call]
            return low
        wide = x if torch.is_autocast_enabled(x.device.type) else x.float()
        return linear(self.dropout(wide), right_RI)

    def _apply_core(self, low: Tensor) -> Tensor:
        if self.has_singular_values:
            # Multiplied in float32; under autocast the next product would round to this dtype in any case.
            return (low * self.factor("lora_S")).to(low.dtype)
        return linear(low, self.factor("lora_R")) if "lora_R" in self._factor_names else low

    def factor(self, name: str) -> Tensor:
        """The live tensor of a factor, by its name in an adapter's file."""
        tensor = getattr(self, name)
        assert isinstance(tensor, Tensor)
        return tensor

    def live_factors(self) -> Factors:
        """The factors without a copy: they change as training goes on."""
        return Factors.of({name: self.factor(name).detach() for name in self._factor_names})

    def copy_factors(self) -> Factors:
        """A float32 copy of the current factors on the CPU."""
        return Factors.of(
            {
                name: self.factor(name).detach().to("cpu", torch.float32, copy=True)
                for name in self._factor_names
            }
        )

    def extra_repr(self) -> str:
        """Rank, scale and trained factors, for the printout of a model."""
        trained = [name for name, _ in self.named_parameters(recurse=False)]
        return f"rank={self.factor('lora_A').shape[0]}, scale={self.scale:g}, trains={', '.join(trained)}"


class _FrozenProjection(torch.autograd.Function):
    """A x for a frozen A, with dropout on x; only A and a seed are saved for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, right_RI: Tensor, rate: float, seed: int) -> Tensor:
        ctx.save_for_backward(right_RI)
        ctx.rate = rate
        ctx.seed = seed
        ctx.dtype = x.dtype
        # Under autocast the dtype of the product is autocast's.
        wide = x if torch.is_autocast_enabled(x.device.type) else x.float()
        return linear(wide * _dropout_mask(wide, rate, seed) if rate else wide, right_RI)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (right_RI,) = ctx.saved_tensors
        grad_x = grad @ right_RI.to(grad.dtype)
        if ctx.rate:
            grad_x = grad_x * _dropout_mask(grad_x, ctx.rate, ctx.seed)
        return grad_x.to(ctx.dtype), None, None, None


def _dropout_mask(like: Tensor, rate: float, seed: int) -> Tensor:
    """A mask of the shape of `like` with entries 0 or 1 / (1 - rate), determined by the seed."""
    generator = torch.Generator(like.device).manual_seed(seed)
    mask = torch.empty_like(like, dtype=torch.float32).bernoulli_(1.0 - rate, generator=generator)
    return mask.div_(1.0 - rate).to(like.dtype)


def correct_gradient(left_OR: Tensor, right_RI: Tensor, scale: float) -> None:
    """Replace every gradient g of B by g (scale^2 A A^T)^-1 (second version of LoRA-FA, arXiv:2308.03303v2).

    This is the least-squares solution dB of scale * dB A = dW, where dW is the gradient of the full matrix.
    The factors may be those of several matrices, (..., O, R) and (..., R, I). The correction is linear in
    g, so it may be applied to each backward pass of an accumulated step.
    """
    inverse_RR = torch.linalg.pinv((right_RI.double() @ right_RI.double().mT) * scale**2, hermitian=True)
    inverse_RR = inverse_RR.to(left_OR.dtype)
    left_OR.register_hook(  # type: ignore[no-untyped-call]
        lambda gradient: gradient @ inverse_RR.to(gradient.device)
    )
