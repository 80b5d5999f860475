"""The weighted mean of the changes of adapters, exact."""

from collections.abc import Sequence

from svdconvert.errors import RecipeError
from svdconvert.merging.base import ADAPTERS, MergeMethod, Product, Settings
from svdconvert.merging.parameters import WEIGHT
from svdconvert.merging.sums import concatenated


def merge(products: Sequence[Product], settings: Settings) -> Product:
    """The sum of w_t B_t A_t, divided by the sum of the weights. Raises RecipeError if that is zero."""
    weights = settings.numbers("weight")
    total = sum(weights)
    if abs(total) < 1e-8:
        raise RecipeError("the weights of a mean sum to zero; use --method sum, or other weights")
    return concatenated(products, [weight / total for weight in weights])


METHOD = MergeMethod(
    summary="weighted mean of the changes, exact",
    paper="arXiv:2203.05482",
    takes=ADAPTERS,
    parameters=(WEIGHT,),
    factors=merge,
)
