"""Adapters merged in the joint rank space of their factors, without the matrices that they change."""

from collections.abc import Sequence

from svdconvert.linalg.joint_space import joint_space
from svdconvert.merging.base import MergeMethod, Product, Settings
from svdconvert.merging.spectra import triplets


def combine_products(method: MergeMethod, products: Sequence[Product], settings: Settings) -> Product:
    """(B, A) in float64 of the merged change, of the float32 factors of every adapter, their scales in B.

    A method on changes gets the cores of the products in their joint bases: what depends on the product alone
    (sums, singular values) is exactly what the dense matrices give, and what is done entry by entry is done
    in these bases (core space, arXiv:2509.17786). An adapter without the matrix has factors of rank 0.
    """
    if method.factors is not None:
        return method.factors(products, settings)
    exact = [(left.double(), right.double()) for left, right in products]
    basis_OK, cores, basis_KI = joint_space(exact)
    outer, sigma, inner = triplets(method.merged_change(cores, settings))
    root = sigma.sqrt()
    return basis_OK @ (outer * root), (root[:, None] * inner) @ basis_KI
