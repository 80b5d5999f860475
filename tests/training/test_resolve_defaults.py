"""What the method decides, and what it refuses."""

import re
from pathlib import Path

import pytest
import yaml

from svdconvert.config.train import TrainOptions
from svdconvert.errors import RecipeError
from svdconvert.methods.base import METHODS
from svdconvert.training.resolve_defaults import learning_rate_warning, resolve_defaults

ROOT = Path(__file__).parents[2]


def ignore(sentence: str) -> None:
    raise AssertionError(sentence)


@pytest.mark.parametrize("name", METHODS.names())
def test_the_methods_numbers_are_the_defaults(name: str) -> None:
    method = METHODS.get(name)
    found = resolve_defaults(TrainOptions(), method, 0.0, ignore)
    assert (found.lr, found.penalty) == (method.learning_rate, method.penalty or None)
    assert resolve_defaults(found, method, 0.0, ignore) == found, "a card's command would be refused"
    assert resolve_defaults(TrainOptions(lr=0.5), method, 0.0, ignore).lr == 0.5


def test_sorsas_penalty_can_be_disabled_changed_or_as_published() -> None:
    sorsa = METHODS.get("sorsa")
    assert resolve_defaults(TrainOptions(penalty=0.0), sorsa, 0.0, ignore).penalty == 0.0
    assert resolve_defaults(TrainOptions(penalty=1.5), sorsa, 0.0, ignore).penalty == 1.5
    assert resolve_defaults(TrainOptions(penalty_rule="reference"), sorsa, 0.0, ignore).penalty == 4e-4


def test_options_of_other_methods_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"penalty_rule` are for .*sorsa.*leave them out"):
        resolve_defaults(TrainOptions(penalty=0.1), METHODS.get("pissa"), 0.0, ignore)
    with pytest.raises(RecipeError, match=r"`corrected_gradient` is for .*lora-fa.*leave it out"):
        resolve_defaults(TrainOptions(corrected_gradient=True), METHODS.get("lora"), 0.0, ignore)
    assert resolve_defaults(
        TrainOptions(corrected_gradient=True), METHODS.get("lora-fa"), 0.0, ignore
    ).corrected_gradient


def test_a_warning_about_dropout_is_given_for_principal_components_only() -> None:
    said: list[str] = []
    assert resolve_defaults(TrainOptions(), METHODS.get("pissa"), 0.1, said.append).dropout == 0.1
    assert resolve_defaults(TrainOptions(dropout=0.2), METHODS.get("sorsa"), 0.1, said.append).dropout == 0.2
    first, second = said
    assert first.startswith("`dropout` 0.1 randomly removes principal components")
    assert second.startswith("`dropout` 0.2 randomly removes principal components")
    for name in ("lora", "milora", "lora-xs"):
        resolve_defaults(TrainOptions(dropout=0.1), METHODS.get(name), 0.0, ignore)


def test_the_learning_rate_of_another_method_is_named_with_both_papers() -> None:
    said = learning_rate_warning("milora", METHODS.get("pissa").learning_rate)
    assert said is not None
    assert "`lr` 2e-05 is the rate of pissa" in said
    assert METHODS.get("milora").paper in said and "0.0003" in said
    for name in METHODS.names():
        assert learning_rate_warning(name, METHODS.get(name).learning_rate) is None
    assert learning_rate_warning("pissa", 1.1e-4) is None


def test_no_rate_of_our_recipes_and_documents_is_warned_about() -> None:
    recipes = [yaml.safe_load(path.read_text()) for path in sorted(ROOT.rglob("recipes/**/*.yaml"))]
    used = [
        (recipe["decompose"]["method"], float(recipe["train"]["lr"]))
        for recipe in recipes
        if isinstance(recipe, dict)
        and "lr" in recipe.get("train", {})
        and "method" in recipe.get("decompose", {})
    ]
    assert len(used) > 20
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "recipes" / "demo" / "demo.py"]
    found = [rate for path in texts for rate in re.findall(r"--lr ([\d.e-]*\d)", path.read_text())]
    assert found
    used += [("pissa", float(rate)) for rate in found]  # the method of the examples
    assert [case for case in used if learning_rate_warning(*case)] == []
