"""Refuses options without an effect: an option that is given must change the result."""

from collections.abc import Sequence
from dataclasses import replace

from svdconvert.config.execution import Run
from svdconvert.config.options import MergeOptions, SplitOptions
from svdconvert.errors import RecipeError
from svdconvert.inputs.model import OpenModel
from svdconvert.inputs.model_pair import ModelPair
from svdconvert.methods.base import METHODS, Method

_DEFAULT = SplitOptions()


def refuse_idle_options(method: Method, options: SplitOptions) -> None:
    """Raise RecipeError for an option of `decompose` that has no effect with the others."""
    name = options.method
    _refuse_idle_quantisation(method, options)
    if not method.residual and options.residual_dtype != "auto" and options.residual_format == "plain":
        raise _idle("--residual-dtype", f"{name} leaves the base unchanged")
    if method.residual and options.copy_base:
        raise _idle("--copy-base", f"{name} writes a residual base in any case")
    if not (method.residual or options.copy_base or options.residual_format != "plain"):
        refuse_idle_shard_size(options.max_shard_size, f"{name} does not write the base; add --copy-base")
    if method.work == "thin" and options.svd != _DEFAULT.svd and not _is_fitted(method, options):
        raise _idle("--svd", f"{name} computes no singular triplets")
    if options.tol != _DEFAULT.tol and not _searches(method, options):
        raise _idle("--tol", "it bounds the error of the fast SVD, which is not used")
    if options.seed and not _draws(method, options):
        raise _idle("--seed", f"{name} draws no random numbers with --svd {options.svd}")


def without_idle_seed(options: SplitOptions) -> SplitOptions:
    """The options without a seed if nothing is drawn: the seed of a recipe serves all of its commands."""
    method = METHODS.get(options.method).variant(options.init)
    return options if _draws(method, options) else replace(options, seed=_DEFAULT.seed)


def _draws(method: Method, options: SplitOptions) -> bool:
    return method.draws or _searches(method, options)


def _searches(method: Method, options: SplitOptions) -> bool:
    """True if the fast SVD is used: for the method's split, or to fit it to a residual in 4 bits."""
    return options.svd == "fast" and (method.work == "search" or _is_fitted(method, options))


def _is_fitted(method: Method, options: SplitOptions) -> bool:
    return method.residual and options.residual_format != "plain"


_OF_QUANTISATION = ("quant_start", "quant_iterations", "double_quant", "nuclear_ratio")
_OF_ALTERNATION = ("quant_start", "quant_iterations")


def _refuse_idle_quantisation(method: Method, options: SplitOptions) -> None:
    if options.residual_format == "plain":
        _refuse_given(options, _OF_QUANTISATION, "it belongs to --residual-format nf4")
        return
    _refuse_given(options, ("residual_dtype",), "--residual-format nf4 stores the residual in 4 bits")
    _refuse_given(options, ("copy_base",), "--residual-format nf4 writes a base in any case")
    if not method.residual:
        _refuse_given(options, _OF_ALTERNATION, f"the factors of {options.method} start at zero")


def _refuse_given(options: SplitOptions, names: Sequence[str], reason: str) -> None:
    """Raise RecipeError if one of these options is given."""
    for name in names:
        if getattr(options, name) != getattr(_DEFAULT, name):
            raise _idle(f"--{name.replace('_', '-')}", reason)


def refuse_idle_experts(experts: str, has_experts: bool) -> None:  # noqa: FBT001 (one fact)
    """Raise RecipeError if factors of experts are to be stored in a special way and there are none."""
    if experts != _DEFAULT.experts and not has_experts:
        raise _idle(f"--experts {experts}", "no expert is adapted")


def refuse_idle_merge_options(options: MergeOptions, dtypes: set[str]) -> None:
    """Raise RecipeError for an option of `merge` that has no effect.

    `dtypes` are the element types of the merged matrices.
    """
    if options.rounding == "stochastic" and not dtypes & {"BF16", "F16"}:
        raise _idle("--rounding stochastic", "the merged matrices are not stored in half precision")
    if options.seed and options.rounding == "nearest":
        raise _idle("--seed", "rounding to nearest draws no random numbers; add --rounding stochastic")


def refuse_idle_shard_size(size: str, reason: str) -> None:
    """Raise RecipeError for a shard size other than the default; `reason` says why it has no effect."""
    if size != _DEFAULT.max_shard_size:
        raise _idle("--max-shard-size", reason)


def refuse_idle_stream(model: OpenModel, run: Run) -> None:
    """Raise RecipeError for --stream if the weights are on this disk and are not pushed shard by shard."""
    if run.stream and model.snapshot.revision is None and run.shard_sink is None:
        raise _idle("--stream", f"{model.path} is on this disk, and nothing is pushed")


def refuse_idle_stream_of_pair(pair: ModelPair, run: Run) -> None:
    """Raise RecipeError for --stream if both checkpoints are on this disk."""
    if run.stream and all(model.snapshot.revision is None for model in pair.models):
        raise _idle("--stream", f"{pair.base.path} and {pair.tuned.path} are on this disk")


def refuse_stream_of_adapters(run: Run) -> None:
    """Raise RecipeError for --stream if only adapters are read."""
    if run.stream:
        raise _idle("--stream", "adapters are small, and are downloaded as a whole")


def _idle(option: str, reason: str) -> RecipeError:
    return RecipeError(f"{option} changes nothing here: {reason}; leave it out")
