"""What a method decides where the plan leaves it open, and what it cannot do."""

from collections.abc import Callable
from dataclasses import replace

from svdconvert.config.train import TrainOptions
from svdconvert.errors import RecipeError
from svdconvert.methods.base import Method
from svdconvert.training.optim.orthonormality import PUBLISHED


def resolve_defaults(
    plan: TrainOptions, method: Method, dropout: float, notify: Callable[[str], None]
) -> TrainOptions:
    """The plan with the method's rate and penalty, and the start's dropout, where it has none of its own.

    Says where a choice is likely a mistake; raises RecipeError where it cannot be followed.
    """
    if plan.penalty and not method.penalty:
        raise RecipeError("penalty is for methods that train U and V apart from S (sorsa); leave it out")
    if plan.corrected_gradient and method.trains != {"lora_B"}:
        raise RecipeError("corrected_gradient is for methods that train B alone (lora-fa); leave it out")
    chosen = replace(plan.with_rate(method.learning_rate), dropout=plan.dropout or dropout)
    if chosen.penalty is None:
        own = PUBLISHED if plan.penalty_rule == "reference" else method.penalty
        chosen = replace(chosen, penalty=own if method.penalty else 0.0)
    if chosen.dropout and method.dropout_harms:
        notify(
            f"dropout {chosen.dropout:g} takes principal components of the model away at random, for they "
            "are in the adapter; this method is meant to be trained without"
        )
    return chosen
