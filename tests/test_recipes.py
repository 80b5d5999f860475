"""Every recipe is read, can be planned, and runs for two steps on a tiny model."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.config.recipe import options, read_recipe, variants_of
from svdconvert.config.recipe_files import PACKAGED, recipe_names
from svdconvert.config.train import TrainOptions
from svdconvert.evaluation.base import tasks_named
from svdconvert.manifest.schema import read_manifest
from svdconvert.workflow.plan import plan_experiment
from svdconvert.workflow.run import run
from tests.conftest import Build
from tests.program import refused, succeeded
from tests.reading import readable, write_sums

ROOT = Path(__file__).resolve().parents[1] / "recipes"
RECIPES = sorted(PACKAGED.glob("*.yaml"))
SINGLE = [path for path in RECIPES if not read_recipe(path).variants]
EXPERIMENTS = [path for path in RECIPES if path not in SINGLE]

every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
every_single_recipe = pytest.mark.parametrize("recipe", SINGLE, ids=lambda path: path.stem)
every_experiment = pytest.mark.parametrize("recipe", EXPERIMENTS, ids=lambda path: path.stem)


@every_recipe
def test_a_recipe_is_listed_and_says_what_it_is(recipe: Path) -> None:
    assert f"/{recipe.name})" in (ROOT / "README.md").read_text()
    assert recipe.read_text().startswith("# ")


@every_single_recipe
def test_the_name_of_a_recipe_begins_with_its_method(recipe: Path) -> None:
    assert recipe.name.startswith(options(SplitOptions, read_recipe(recipe), {}).method)


@every_recipe
def test_a_recipe_can_be_planned_and_names_known_tasks(recipe: Path) -> None:
    experiment = plan_experiment(read_recipe(recipe), {}, Path("out"))
    for plan in experiment.plans:
        assert plan.options["train"].data
        if recipe.stem != "pissa-rwkv6-world":  # World models have no published task
            assert plan.evaluation is not None
            kinds = {task.kind for task in tasks_named(plan.evaluation.tasks)}
            assert kinds == {"generate" if plan.options["train"].task == "text" else "classify"}


def test_every_recipe_of_the_package_is_listed() -> None:
    rows = {row["recipe"]: row for row in json.loads(succeeded("list", "recipes", "--json").out)}
    assert [*rows] == recipe_names() == sorted(path.stem for path in RECIPES)
    assert rows["arithmetic-smollm2"]["method"] == "pissa, lora, full"
    assert all(row["model"] and row["about"] for row in rows.values())


def test_a_recipe_of_the_package_is_found_by_its_name() -> None:
    assert read_recipe(Path("pissa-smollm2-gsm8k")) == read_recipe(PACKAGED / "pissa-smollm2-gsm8k.yaml")
    words = ["pissa-smolm2-gsm8k", "did you mean pissa-smollm2-gsm8k?"]
    refused("decompose", "model", "-o", "out", "--recipe", "pissa-smolm2-gsm8k", words=words)


def test_a_file_comes_before_a_recipe_of_the_package_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pissa-smollm2-gsm8k").write_text("model: mine\n")
    assert read_recipe(Path("pissa-smollm2-gsm8k")).get("model") == "mine"


def test_a_data_file_next_to_the_recipe_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "recipe.yaml").write_text(
        "train: {data: [rows.jsonl, other.jsonl, org/name], eval_data: rows.jsonl}\n"
        "eval: {data: rows.jsonl}\n"
    )
    sections = read_recipe(tmp_path / "recipe.yaml").sections
    rows = str(tmp_path / "rows.jsonl")
    assert sections["train"] == {"data": [rows, "other.jsonl", "org/name"], "eval_data": rows}
    assert sections["eval"] == {"data": rows}


FAMILIES = {
    "roberta": "roberta",
    "lora-fa-glue": "roberta",
    "minilm": "bert",
    "gemma": "gemma",
    "mistral": "mistral",
}


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
@every_single_recipe
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
@every_experiment
def test_every_variant_of_an_experiment_runs_on_a_tiny_model(
    recipe: Path, checkpoint: Build, tmp_path: Path
) -> None:
    content = {**yaml.safe_load(recipe.read_text()), "seeds": [1]}
    asks = content["eval"]["tasks"] != "arithmetic"
    content["steps"] = ["train", "eval"] if asks else ["train"]
    for part in (content, *content["variants"].values()):
        if "rank" in part.get("decompose", {}):
            part["decompose"]["rank"] = 2
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    single = variants_of(read_recipe(recipe), {})[0][1]
    rows = str(_rows(options(TrainOptions, single, {}), tmp_path / "rows.jsonl"))
    if content["eval"]["tasks"] == "sst2":
        sentences = [{"sentence": f"{n} + 1", "label": n % 2} for n in range(80)]
        Path(rows).write_text("".join(json.dumps(row) + "\n" for row in sentences))
    changes = {
        "model": str(_model(recipe, checkpoint, tmp_path / "model")),
        "train": {"data": rows, "eval_data": rows, "eval_split": "train", "max_length": 56, "steps": 2},
        "eval": {"data": rows, "limit": 10},
    }
    found = run(tmp_path / "recipe.yaml", tmp_path / "out", Run(device="cpu", threads=1), changes=changes)
    assert len(found) == len(content["variants"])
    for one in found:
        assert one.lr == content["variants"][one.variant]["train"]["lr"]
        assert one.steps == 2 and one.held_out is not None
        for score in one.scores:
            assert (score.n, {*score.metrics}) == (10, {"accuracy", "f1", "matthews"})
        assert len(one.scores) == asks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pissa-smollm2-gsm8k", "lora-smollm2-gsm8k"])
def test_a_recipe_serves_every_command(name: str, checkpoint: Build, tmp_path: Path) -> None:
    recipe = PACKAGED / f"{name}.yaml"
    start, trained = tmp_path / "start", tmp_path / "trained"
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
    recipe = read_recipe(PACKAGED / "pissa-llama-2-7b-metamath.yaml")
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
    words = [tmp_path / "recipe.yaml", "train", "--steps and --epochs exclude each other"]
    refused("train", "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out", words=words)
