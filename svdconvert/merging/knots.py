"""KnOTS: TIES on the right singular vectors of all changes together (arXiv:2410.19735)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from svdconvert.merging.base import ADAPTERS, Blocks, MergeMethod, Product, Settings
from svdconvert.merging.parameters import DENSITY, LAMBDA, WEIGHT, normalize
from svdconvert.merging.sparsity import keep_largest
from svdconvert.merging.spectra import triplets
from svdconvert.merging.sums import agreeing_sum


def merge(products: Sequence[Product], settings: Settings) -> Product:
    """B = U S and A = the merged V_t, with [D_1, ..., D_T] = U S [V_1, ..., V_T].

    U and S come from an SVD in the joint column space of all B_t: the matrix (O, T I) is not made. V_t are
    merged as TIES does: the largest entries, an election of signs, the mean of those that agree.
    """
    basis_OK, core = torch.linalg.qr(torch.cat([left for left, _ in products], dim=1).double())
    cores = core.split([left.shape[1] for left, _ in products], dim=1)
    side = torch.cat([part @ right.double() for part, (_, right) in zip(cores, products, strict=True)], dim=1)
    outer, sigma, inner = triplets(side)
    width = settings.shape[1]
    parts: list[Tensor] = [inner[:, start : start + width] for start in range(0, inner.shape[1], width)]
    (largest,) = keep_largest(Blocks.of_matrices(parts), settings)
    merged = agreeing_sum(largest, settings)
    return basis_OK @ (outer * sigma), merged


METHOD = MergeMethod(
    summary="TIES on the right singular vectors of all changes",
    paper="arXiv:2410.19735",
    takes=ADAPTERS,
    parameters=(WEIGHT, DENSITY, LAMBDA, normalize(True)),
    factors=merge,
)
