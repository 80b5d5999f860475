"""A frozen linear layer with an adapter beside it.  O: out features, I: in features, R: rank.

    y = base(x) + scale * B core A x

computed from right to left, so that nothing as large as the base's own weight is ever built.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from svdconvert.factors import Factors


class AdaptedLinear(nn.Module):
    """`base`, frozen, plus scale * the factors, of which `trains` are trained.

    The pieces are float32: lora_A (R, I), lora_B (O, R) and, where there is a core, lora_S (R,) or
    lora_R (R, R). The trained ones are parameters, the others buffers. They live where the base's
    weight does.
    """

    def __init__(
        self, base: nn.Linear, factors: Factors, scale: float, trains: frozenset[str], dropout: float = 0.0
    ) -> None:
        super().__init__()
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

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O) in the dtype of the base's output.

        Under autocast the adapter computes in autocast's dtype, otherwise in float32.
        """
        out: Tensor = self.base(x)
        low = self.dropout(x if torch.is_autocast_enabled(x.device.type) else x.float())
        low = self._through_core(linear(low, self.get("lora_A"))) * self.scale
        # The sum before the cast: one rounding to the base's dtype, not two.
        return (out + linear(low, self.get("lora_B"))).to(out.dtype)

    def _through_core(self, low: Tensor) -> Tensor:
        if "lora_S" in self._pieces:
            return low * self.get("lora_S")
        return linear(low, self.get("lora_R")) if "lora_R" in self._pieces else low

    def get(self, piece: str) -> Tensor:
        """The live tensor of a piece, by its name in an adapter file."""
        tensor = getattr(self, piece)
        assert isinstance(tensor, Tensor)
        return tensor

    def factors(self) -> Factors:
        """The pieces as they are now: a float32 copy on the CPU that further training does not touch."""
        return Factors.of(
            {name: self.get(name).detach().to("cpu", torch.float32, copy=True) for name in self._pieces}
        )

    def extra_repr(self) -> str:
        """The rank, the scale and the trained pieces, for torch's printout of a model."""
        trained = [name for name, _ in self.named_parameters(recurse=False)]
        return f"rank={self.get('lora_A').shape[0]}, scale={self.scale:g}, trains={', '.join(trained)}"
