"""PEFT's combination_type magnitude_prune_svd on the products B A, cut to a rank."""

from svdconvert.merging.peft_rules import magnitude_prune, on_products

METHOD = on_products(magnitude_prune, "PEFT's magnitude pruning of the products, cut by an SVD")
