"""Every recipe is read, and runs for two steps on a tiny model."""

import json
from pathlib import Path

import pytest
import torch

from svdconvert.config.options import SplitOptions
from svdconvert.config.recipe import options, read_recipe
from svdconvert.config.train import TrainOptions
from svdconvert.manifest.schema import read_manifest
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


FAMILIES = {"roberta": "roberta", "minilm": "bert", "gemma": "gemma", "mistral": "mistral"}


def _model(recipe: Path, checkpoint: Build, directory: Path) -> Path:
    """A tiny model of the recipe's family; Llama for what has no tiny one here."""
    kind = next((kind for word, kind in FAMILIES.items() if word in recipe.stem), "llama")
    return readable(checkpoint(kind, dtype=torch.float32), directory)


def _rows(plan: TrainOptions, path: Path) -> Path:
    """Rows with the recipe's fields."""
    if plan.task == "text":
        rows = [json.loads(line) for line in write_sums(path, rows=80).read_text().splitlines()]
        names = (plan.prompt_field or "question", plan.response_field or "answer")
        rows = [dict(zip(names, row.values(), strict=True)) for row in rows]
    else:
        rows = [{"sentence1": f"{n} + 1", "sentence2": "is", "label": n % 2} for n in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
@every_recipe
def test_a_recipe_runs_on_a_tiny_model(recipe: Path, checkpoint: Build, tmp_path: Path) -> None:
    wanted = options(TrainOptions, read_recipe(recipe), {})
    model = _model(recipe, checkpoint, tmp_path / "model")
    rows, trained = _rows(wanted, tmp_path / "rows.jsonl"), tmp_path / "trained"
    small: tuple[object, ...] = ("--data", rows, "--max-length", 56, "--accumulate", 1, "--batch-size", 4)
    if wanted.eval_data:
        small += ("--eval-data", rows, "--eval-split", "train")
    if wanted.template:
        small += ("--template", "none")
    succeeded("train", model, "-o", trained, "--recipe", recipe, *small, "--steps", 2, "--rank", 4)
    used = read_manifest(trained)
    assert (used.options["steps"], used.options["epochs"]) == (2, None)
    for key in ("lr", "seed", "schedule", "warmup", "task", "prompt_loss", "ending"):
        assert used.options[key] == getattr(wanted, key)
    assert used.method == options(SplitOptions, read_recipe(recipe), {}).method


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pissa-smollm2-gsm8k", "lora-smollm2-gsm8k"])
def test_a_recipe_serves_every_command(name: str, checkpoint: Build, tmp_path: Path) -> None:
    recipe, start, trained = ROOT / f"{name}.yaml", tmp_path / "start", tmp_path / "trained"
    model = _model(recipe, checkpoint, tmp_path / "model")
    rows = write_sums(tmp_path / "sums.jsonl", rows=80)
    succeeded("decompose", model, "-o", start, "--recipe", recipe, "--rank", 4, "--alpha", 4)
    small = ("--data", rows, "--max-length", 48, "--steps", 2)
    succeeded("train", start, "-o", trained, "--recipe", recipe, *small)
    succeeded("merge", trained, "-o", tmp_path / "merged", "--recipe", recipe)
    succeeded("to-lora", trained, "-o", tmp_path / "lora", "--recipe", recipe)


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations_and_they_say_what_was_tried(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes == 8
    words = " ".join(path.read_text().replace("#", " ").split())
    assert "Tried:" in words and "Not tried:" in words


def test_pissas_published_setting_is_as_published() -> None:
    recipe = read_recipe(ROOT / "pissa-llama-2-7b-metamath.yaml")
    split, plan = options(SplitOptions, recipe, {}), options(TrainOptions, recipe, {})
    assert (split.rank, split.alpha, split.targets) == (128, None, ("all-linear",))
    assert (plan.lr, plan.batch_size * plan.accumulate, plan.max_length) == (2e-5, 128, 512)
    assert (plan.schedule, plan.warmup, plan.weight_decay, plan.precision) == ("cosine", 0.03, 0.0, "bf16")
    assert plan.total_steps(100_000) == 782


def test_typed_steps_take_the_place_of_a_recipes_epochs(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("train: {epochs: 3}\n")
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert options(TrainOptions, recipe, {"steps": 5}).total_steps(100) == 5
    assert options(TrainOptions, recipe, {}).total_steps(100) == 75
    assert options(TrainOptions, recipe, {"epochs": 1.0}).total_steps(100) == 25


def test_a_recipe_with_both_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: m\ntrain: {data: d, epochs: 3, steps: 2}\n")
    words = [tmp_path / "recipe.yaml", "train", "steps and epochs exclude each other"]
    refused("train", "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out", words=words)
