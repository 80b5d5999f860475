"""PEFT's combination_type dare_ties on A and on B: not what their products give."""

from svdconvert.merging.peft_rules import dare_ties, on_factors

METHOD = on_factors(dare_ties, "PEFT's DARE with TIES of A and of B", draws=True)
