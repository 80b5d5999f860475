"""PEFT's combination_type dare_linear on A and on B: not what their products give."""

from svdconvert.merging.peft_rules import dare_linear, on_factors

METHOD = on_factors(dare_linear, "PEFT's DARE of A and of B", draws=True)
