"""PEFT's combination_type ties_svd on the products B A, cut to a rank."""

from svdconvert.merging.peft_rules import on_products, ties

METHOD = on_products(ties, "PEFT's TIES of the products, cut by an SVD")
