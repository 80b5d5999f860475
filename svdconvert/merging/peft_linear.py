"""PEFT's combination_type linear on A and on B: not what their products give."""

from svdconvert.merging.peft_rules import linear, on_factors

METHOD = on_factors(linear, "weighted sums of A and of B, as PEFT does", sparse=False)
