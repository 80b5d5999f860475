"""The prompts that several tasks share."""

from svdconvert.training.data.prompts import ALPACA

STEP_BY_STEP = " Let's think step by step."


def step_by_step(question: str) -> str:
    """The prompt of PiSSA, MiLoRA and SORSA for GSM8K and MATH: Alpaca's, and the beginning of the answer."""
    return ALPACA.format(prompt=question) + STEP_BY_STEP
