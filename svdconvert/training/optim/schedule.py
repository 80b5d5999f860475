"""The learning rate of every step."""

from math import ceil, cos, pi

from svdconvert.config.train import TrainOptions


def learning_rate(options: TrainOptions, step: int, total: int) -> float:
    """The rate of step 1 <= `step` <= `total`: a linear warm-up, then the schedule of the options.

    Without a warm-up these are the schedules of transformers. With one, transformers gives the first step the
    rate 0, which wastes it; these schedules are one step ahead.
    """
    assert options.lr is not None, "no learning rate: TrainOptions.with_default_lr sets the method's"
    # The last warm-up step has the full rate, so a warm-up of one step has no effect.
    warmup_steps = max(1, ceil(options.warmup * total))
    if step <= warmup_steps:
        return options.lr * step / warmup_steps
    progress = (step - warmup_steps) / (total + 1 - warmup_steps)
    factors = {"constant": 1.0, "linear": 1.0 - progress, "cosine": (1.0 + cos(pi * progress)) / 2}
    return options.lr * factors[options.schedule]
