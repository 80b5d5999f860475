"""Full fine-tuning: every weight is trained and there is no adapter; the baseline of the other methods."""

from svdconvert.methods.base import WEIGHT, Method

METHOD = Method(
    summary="trains every weight, without an adapter: the baseline, `train` only",
    paper="-",
    split=None,
    trains=frozenset({WEIGHT}),
    residual=False,
    spectrum_part="whole",
    learning_rate=1e-5,
)
