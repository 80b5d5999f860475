"""What the method decides, and what it refuses."""

import pytest

from svdconvert.config.train import TrainOptions
from svdconvert.errors import RecipeError
from svdconvert.methods.base import METHODS
from svdconvert.training.resolve_defaults import resolve_defaults


def ignore(sentence: str) -> None:
    raise AssertionError(sentence)


@pytest.mark.parametrize("name", METHODS.names())
def test_the_methods_own_numbers_hold_where_the_plan_has_none(name: str) -> None:
    method = METHODS.get(name)
    found = resolve_defaults(TrainOptions(), method, 0.0, ignore)
    assert (found.lr, found.penalty) == (method.learning_rate, method.penalty)
    assert resolve_defaults(TrainOptions(lr=0.5), method, 0.0, ignore).lr == 0.5


def test_sorsas_penalty_can_be_off_another_or_the_published_one() -> None:
    sorsa = METHODS.get("sorsa")
    assert resolve_defaults(TrainOptions(penalty=0.0), sorsa, 0.0, ignore).penalty == 0.0
    assert resolve_defaults(TrainOptions(penalty=1.5), sorsa, 0.0, ignore).penalty == 1.5
    assert resolve_defaults(TrainOptions(penalty_rule="reference"), sorsa, 0.0, ignore).penalty == 4e-4


def test_what_the_method_does_not_have_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"penalty is for .*sorsa.*leave it out"):
        resolve_defaults(TrainOptions(penalty=0.1), METHODS.get("pissa"), 0.0, ignore)
    with pytest.raises(RecipeError, match=r"corrected_gradient is for .*lora-fa.*leave it out"):
        resolve_defaults(TrainOptions(corrected_gradient=True), METHODS.get("lora"), 0.0, ignore)
    assert resolve_defaults(
        TrainOptions(corrected_gradient=True), METHODS.get("lora-fa"), 0.0, ignore
    ).corrected_gradient


def test_dropout_on_principal_components_is_warned_about_and_on_others_is_not() -> None:
    said: list[str] = []
    assert resolve_defaults(TrainOptions(), METHODS.get("pissa"), 0.1, said.append).dropout == 0.1
    assert resolve_defaults(TrainOptions(dropout=0.2), METHODS.get("sorsa"), 0.1, said.append).dropout == 0.2
    assert ["dropout 0.1 takes principal" in said[0], "dropout 0.2 takes principal" in said[1]] == [
        True,
        True,
    ]
    for name in ("lora", "milora", "lora-xs"):
        resolve_defaults(TrainOptions(dropout=0.1), METHODS.get(name), 0.0, ignore)
