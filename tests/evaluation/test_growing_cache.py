"""The cache that appends in place holds what transformers' own holds."""

import torch
from transformers.cache_utils import DynamicLayer

from svdconvert.evaluation.growing_cache import GrowingLayer


def test_rows_are_appended_and_kept_as_transformers_does() -> None:
    random = torch.Generator().manual_seed(0)
    own, stock = GrowingLayer(), DynamicLayer()
    rows = 6
    for kept in ([0, 1, 2, 3, 4, 5], [0, 5, 2, 4], [0, 3, 2], [1, 0], [1]):
        for length in (3, 1, 140):
            keys, values = torch.randn(2, rows, 2, length, 4, generator=random)
            for layer in (own, stock):
                layer.update(keys, values)
        for layer in (own, stock):
            layer.batch_select_indices(torch.tensor(kept))
        rows = len(kept)
        assert torch.equal(own.keys, stock.keys) and torch.equal(own.values, stock.values)
        assert own.get_seq_length() == stock.get_seq_length()
