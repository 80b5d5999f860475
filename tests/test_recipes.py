"""Every recipe is read, and runs for two steps on a tiny model."""

from pathlib import Path

import pytest
import torch

from svdconvert.artifact.manifest import read_manifest
from svdconvert.artifact.options import SplitOptions
from svdconvert.recipe import options, read_recipe
from svdconvert.training.plan import TrainPlan
from tests.conftest import Build
from tests.program import refused, succeeded
from tests.reading import readable, write_sums

ROOT = Path(__file__).resolve().parents[1] / "recipes"
RECIPES = sorted(ROOT.glob("*.yaml"))

every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


@every_recipe
def test_a_recipe_is_listed_and_says_what_it_is(recipe: Path) -> None:
    assert f"({recipe.name})" in (ROOT / "README.md").read_text()
    assert recipe.read_text().startswith("# ")
    assert recipe.name.startswith(options(SplitOptions, read_recipe(recipe), {}).method)


@every_recipe
def test_a_recipe_runs_on_a_tiny_model(recipe: Path, checkpoint: Build, tmp_path: Path) -> None:
    model = readable(checkpoint("llama", dtype=torch.float32), tmp_path / "model")
    rows = write_sums(tmp_path / "sums.jsonl", rows=80)
    start, trained = tmp_path / "start", tmp_path / "trained"
    succeeded("decompose", model, "-o", start, "--recipe", recipe, "--rank", 4, "--alpha", 4)
    small = ("--data", rows, "--max-length", 48, "--accumulate", 1)
    succeeded("train", start, "-o", trained, "--recipe", recipe, *small, "--steps", 2)
    wanted = options(TrainPlan, read_recipe(recipe), {"data": str(rows), "steps": 2})
    used = read_manifest(trained).options
    assert (used["steps"], used["epochs"]) == (2, None)
    assert [used[key] for key in ("lr", "seed", "schedule")] == [wanted.lr, wanted.seed, wanted.schedule]
    succeeded("merge", trained, "-o", tmp_path / "merged", "--recipe", recipe)
    succeeded("to-lora", trained, "-o", tmp_path / "lora", "--recipe", recipe)


def test_pissas_published_setting_is_as_published() -> None:
    recipe = read_recipe(ROOT / "pissa-llama-2-7b-metamath.yaml")
    split, plan = options(SplitOptions, recipe, {}), options(TrainPlan, recipe, {})
    assert (split.rank, split.alpha, split.targets) == (128, None, ("all-linear",))
    assert (plan.lr, plan.batch_size * plan.accumulate, plan.max_length) == (2e-5, 128, 512)
    assert (plan.schedule, plan.warmup, plan.weight_decay, plan.precision) == ("cosine", 0.03, 0.0, "bf16")
    assert plan.total_steps(100_000) == 782


def test_typed_steps_take_the_place_of_a_recipes_epochs(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("train: {epochs: 3}\n")
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert options(TrainPlan, recipe, {"steps": 5}).total_steps(100) == 5
    assert options(TrainPlan, recipe, {}).total_steps(100) == 75
    assert options(TrainPlan, recipe, {"epochs": 1.0}).total_steps(100) == 25


def test_a_recipe_with_both_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: m\ntrain: {data: d, epochs: 3, steps: 2}\n")
    words = [tmp_path / "recipe.yaml", "train", "steps and epochs exclude each other"]
    refused("train", "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out", words=words)
