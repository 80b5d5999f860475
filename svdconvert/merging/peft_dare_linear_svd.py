"""PEFT's combination_type dare_linear_svd on the products B A, cut to a rank."""

from svdconvert.merging.peft_rules import dare_linear, on_products

METHOD = on_products(dare_linear, "PEFT's DARE of the products, cut by an SVD", draws=True)
