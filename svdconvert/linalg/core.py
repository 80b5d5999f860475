"""Products of thin factors at the cost of their core.  O: out features, I: in features, R: rank."""

import torch
from torch import Tensor


def singular_values(left_OR: Tensor, right_RI: Tensor) -> Tensor:
    """The R singular values of left @ right, descending, without building the product.

    QR of both thin factors, then the SVD of the R x R core.
    """
    core = torch.linalg.qr(left_OR).R @ torch.linalg.qr(right_RI.T).R.T
    values: Tensor = torch.linalg.svdvals(core)
    return values
