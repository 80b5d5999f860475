"""The learning rate of every step."""

from math import ceil, cos, pi

from svdconvert.config.train import TrainOptions


def learning_rate(plan: TrainOptions, step: int, total: int) -> float:
    """The rate of step `step` of 1 to `total`: a linear rise over the warm-up, then the plan's schedule.

    Without a warm-up these are transformers' schedules. With one, theirs give the first step the rate 0 and
    so waste it; these are one step ahead.
    """
    assert plan.lr is not None, "the plan has no rate: TrainPlan.with_rate fills in the method's"
    # The last step of the warm-up has the full rate, so one such step is no warm-up at all.
    warm = max(1, ceil(plan.warmup * total))
    if step <= warm:
        return plan.lr * step / warm
    gone = (step - warm) / (total + 1 - warm)
    shares = {"constant": 1.0, "linear": 1.0 - gone, "cosine": (1.0 + cos(pi * gone)) / 2}
    return plan.lr * shares[plan.schedule]
