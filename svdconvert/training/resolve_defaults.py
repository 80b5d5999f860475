"""Options that the method decides if the user has not, and options that it cannot follow."""

from collections.abc import Callable
from dataclasses import replace
from math import isclose

from svdconvert.config.train import TrainOptions
from svdconvert.errors import RecipeError
from svdconvert.methods.base import METHODS, Method
from svdconvert.training.optim.orthonormality import PUBLISHED

_SIMILAR = 2.0  # no warning for a learning rate within this factor of the method's own


def resolve_defaults(
    options: TrainOptions, method: Method, dropout: float, notify: Callable[[str], None]
) -> TrainOptions:
    """The options with the method's learning rate and penalty, and the adapter's `dropout`, filled in.

    Calls `notify` with a sentence if a choice is probably a mistake. Raises RecipeError for an option that
    the method cannot follow.
    """
    if method.split is None and (options.task != "text" or options.train_also):
        raise RecipeError(
            "full fine-tuning trains every weight of a causal language model; leave out `task` and "
            "`train_also`"
        )
    if (options.penalty is not None or options.penalty_rule != "weight") and not method.penalty:
        raise RecipeError(
            "`penalty` and `penalty_rule` are for methods that train U and V separately from S (sorsa); "
            "leave them out"
        )
    if options.eval_every and not (options.holds_out or method.residual):
        raise RecipeError(
            "`eval_every` changes nothing without held-out rows; give `eval_rows` or `eval_data`, or leave "
            "it out"
        )
    if options.corrected_gradient and method.trains != {"lora_B"}:
        raise RecipeError("`corrected_gradient` is for methods that train B only (lora-fa); leave it out")
    resolved = replace(options.with_default_lr(method.learning_rate), dropout=options.dropout or dropout)
    if resolved.penalty is None and method.penalty:
        default = PUBLISHED if options.penalty_rule == "reference" else method.penalty
        resolved = replace(resolved, penalty=default)
    if resolved.dropout and method.dropout_harms:
        notify(
            f"`dropout` {resolved.dropout:g} randomly removes principal components of the model, because "
            "they are in the adapter; this method is meant to be trained without dropout"
        )
    return resolved


def check_options_beyond_the_run(options: TrainOptions, steps: int, notify: Callable[[str], None]) -> None:
    """Name the options whose first effect would come after the last of `steps` steps.

    Raises RecipeError for keep_checkpoints. For intervals, which a recipe has for longer runs, it calls
    `notify` with a sentence.
    """
    text = f"changes nothing in a run of {steps} steps"
    if options.keep_checkpoints and options.save_every > steps:
        raise RecipeError(
            f"`keep_checkpoints` {text}, because `save_every` is {options.save_every}; lower it, or leave it "
            "out"
        )
    if options.eval_every is not None and options.eval_every >= steps:
        notify(f"`eval_every` {options.eval_every} {text}")
    evaluations = (steps - 1) // (options.eval_every or steps)  # after the first step and before the last
    if options.patience is not None and options.patience > evaluations:
        notify(f"`patience` {options.patience} {text}, in which the held-out loss is measured too rarely")


def learning_rate_warning(method: str, lr: float) -> str | None:
    """A sentence if `lr` is another method's rate and far from this method's, with both papers; else None.

    None too for a rate that this method is known to learn well with.
    """
    own = METHODS.get(method)
    rates = (own.learning_rate, *own.other_rates)
    if any(1 / _SIMILAR <= lr / rate <= _SIMILAR for rate in rates):
        return None
    for name, other in METHODS.load_all()[0].items():
        if isclose(lr, other.learning_rate, rel_tol=1e-3):
            return (
                f"`lr` {lr:g} is the rate of {name} ({other.paper}); the results published for {method} "
                f"({own.paper}) are for {own.learning_rate:g}"
            )
    return None
