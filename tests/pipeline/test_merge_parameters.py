"""The value of a parameter for one tensor, by mergekit's rules."""

import pytest

from svdconvert.config.mergekit_file import Condition
from svdconvert.errors import RecipeError
from svdconvert.merging.base import MERGES
from svdconvert.merging.parameters import DENSITY, WEIGHT, normalize
from svdconvert.pipeline.merge_parameters import between, refuse_unknown, resolve


def test_the_first_condition_that_applies_of_the_innermost_scope_decides() -> None:
    inner = {"density": (Condition(0.1, "mlp"),)}
    outer = {"density": (Condition(0.2, "attn"), Condition(0.3))}
    for tensor, expected in (("a.mlp.b", 0.1), ("a.attn.b", 0.2), ("norm", 0.3)):
        assert resolve(DENSITY, [inner, None, outer], tensor, 0.0, "file") == expected
    assert resolve(DENSITY, [inner], "norm", 0.0, "file") == 1.0


def test_a_list_goes_from_the_first_layer_to_the_last() -> None:
    scope = {"weight": (Condition((0, 1, "3e0")),)}
    for position, expected in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 2.0), (1.0, 3.0)):
        assert resolve(WEIGHT, [scope], "a", position, "file") == pytest.approx(expected)
    assert between([4.0], 0.3) == 4.0
    flags = {"normalize": (Condition((True, False)),)}
    assert resolve(normalize(True), [flags], "a", 0.9, "file") is True
    assert resolve(normalize(True), [flags], "a", 1.0, "file") is False


def test_what_is_missing_unknown_or_out_of_range_is_refused() -> None:
    with pytest.raises(RecipeError, match="file gives no weight for a"):
        resolve(WEIGHT, [None], "a", 0.0, "file")
    with pytest.raises(RecipeError, match="density is 1.5, which must be from 0 to 1"):
        resolve(DENSITY, [{"density": (Condition(1.5),)}], "a", 0.0, "file")
    with pytest.raises(RecipeError, match="the parameter 'densiti', which the method does not.*density"):
        refuse_unknown(MERGES.get("ties"), [{"densiti": (Condition(1.0),)}], "file")
