"""PEFT's combination_type ties on A and on B: not what their products give."""

from svdconvert.merging.peft_rules import on_factors, ties

METHOD = on_factors(ties, "PEFT's TIES of A and of B")
