"""PEFT's combination_type magnitude_prune on A and on B: not what their products give."""

from svdconvert.merging.peft_rules import magnitude_prune, on_factors

METHOD = on_factors(magnitude_prune, "PEFT's magnitude pruning of A and of B")
