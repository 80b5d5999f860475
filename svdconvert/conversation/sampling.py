"""Which token comes next.  V: vocabulary."""

import torch
from torch import Tensor

from svdconvert.config.chat import ChatOptions
from svdconvert.errors import ArtifactError


class Sampler:
    """Chooses tokens from logits; the same seed chooses the same."""

    def __init__(self, options: ChatOptions) -> None:
        self._temperature = options.temperature
        self._top_p = options.top_p
        self._generator = torch.Generator().manual_seed(options.seed)

    def choose(self, logits_V: Tensor) -> int:
        """The next token. Raises ArtifactError if the model computes no numbers."""
        logits_V = logits_V.float().cpu()
        if logits_V.isnan().any():
            raise ArtifactError(
                "the model gives NaN instead of scores for the next token; check its files with verify, or "
                "give `dtype` float32"
            )
        if self._temperature == 0:
            return int(logits_V.argmax())
        probabilities_V = torch.softmax(logits_V.double() / self._temperature, 0)
        return int(torch.multinomial(nucleus(probabilities_V, self._top_p), 1, generator=self._generator))


def nucleus(probabilities_V: Tensor, share: float) -> Tensor:
    """The probabilities of the fewest tokens that have `share` of them together, and 0 for all others.

    Not normalised. At least one token is left. (Holtzman et al., arXiv:1904.09751.)
    """
    if share >= 1:
        return probabilities_V
    sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
    before_V = sorted_V.cumsum(0) - sorted_V
    kept_V = torch.where(before_V < share, sorted_V, torch.zeros_like(sorted_V))
    return torch.zeros_like(probabilities_V).scatter(0, order_V, kept_V)
