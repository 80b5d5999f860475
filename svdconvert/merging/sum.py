"""The weighted sum of the changes of adapters, exact: the factors one after the other (PEFT's cat)."""

from collections.abc import Sequence

from svdconvert.merging.base import ADAPTERS, MergeMethod, Product, Settings
from svdconvert.merging.parameters import WEIGHT
from svdconvert.merging.sums import concatenated


def merge(products: Sequence[Product], settings: Settings) -> Product:
    """B = [w_1 B_1, ..., w_T B_T] and A = [A_1; ...; A_T]."""
    return concatenated(products, settings.numbers("weight"))


METHOD = MergeMethod(
    summary="weighted sum of the changes, exact",
    paper="arXiv:2212.04089",
    takes=ADAPTERS,
    parameters=(WEIGHT,),
    factors=merge,
)
