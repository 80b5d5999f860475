"""PEFT's combination_type dare_ties_svd on the products B A, cut to a rank."""

from svdconvert.merging.peft_rules import dare_ties, on_products

METHOD = on_products(dare_ties, "PEFT's DARE with TIES of the products, cut by an SVD", draws=True)
