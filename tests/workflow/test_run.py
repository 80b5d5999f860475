"""`run` performs every step of a recipe, continues what was interrupted, and refuses what does not fit."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from svdconvert.config.execution import Run
from svdconvert.config.recipe import read_recipe, variants_of
from svdconvert.errors import RecipeError
from svdconvert.manifest.evaluations import read_evaluation
from svdconvert.manifest.schema import read_manifest
from svdconvert.workflow import perform
from svdconvert.workflow.run import run
from tests.conftest import Build
from tests.process import start, sums
from tests.program import refused, succeeded
from tests.reading import readable, write_sums

RUN = Run(device="cpu", threads=1)
RECIPE: dict[str, Any] = {
    "seed": 3,
    "decompose": {"method": "pissa", "rank": 2, "targets": "attn.q"},
    "train": {
        "data": "sums.jsonl",
        "eval_rows": 4,
        "steps": 3,
        "batch_size": 2,
        "max_length": 32,
        "lr": 0.01,
        "template": "{prompt}\n",
        "precision": "fp32",
        "save_every": 1,
    },
    "merge": None,
    "to_lora": {},
    "eval": {"tasks": "arithmetic", "data": "sums.jsonl", "limit": 3, "max_new_tokens": 4, "base": True},
    "report": None,
}
FOLDERS = {"decomposed", "trained", "merged", "lora"}


@pytest.fixture
def recipe(checkpoint: Build, tmp_path: Path) -> Callable[..., Path]:
    """Writes RECIPE with changes, next to its rows, for a tiny model."""
    home = tmp_path / "recipes"
    home.mkdir()
    readable(checkpoint("llama", dtype=torch.float32), home / "model")
    rows = [json.loads(line) for line in write_sums(home / "sums.jsonl", rows=12).read_text().splitlines()]
    lines = [
        json.dumps({**row, "answer": f"{row['answer']} #### {row['answer'].split()[-1]}"}) for row in rows
    ]
    (home / "sums.jsonl").write_text("\n".join(lines) + "\n")

    def make(**changes: Any) -> Path:
        content = {"model": str(home / "model"), **RECIPE, **changes}
        path = home / "sums.yaml"
        present = {key: value for key, value in content.items() if value != "absent"}
        path.write_text(yaml.safe_dump(present, sort_keys=False))
        return path

    return make


@pytest.mark.slow
def test_every_step_is_performed_once_and_every_result_is_there(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (base, one) = run(recipe(), out, RUN)
    kinds = {path.name: read_manifest(path).kind for path in out.iterdir() if path.name in FOLDERS}
    assert kinds == {"decomposed": "decomposed", "trained": "trained", "merged": "merged", "lora": "lora"}
    assert read_manifest(out / "trained").residual is not None
    asked = read_evaluation(out / "trained" / "evaluations" / "arithmetic.json")
    assert (one.scores[0].n, one.scores[0].score) == (3, asked.grades["strict"].score)
    assert (base.run, [score.of for score in base.scores]) == ("base", ["base"])
    assert one.held_out is not None and one.loss is not None and one.steps == 3
    assert one.sizes["lora"] == (out / "lora" / "adapter_model.safetensors").stat().st_size
    assert json.loads((out / "results.json").read_text())[1]["run"] == "sums"
    assert "<svg" in (out / "curves.svg").read_text()
    assert "held-out" in (out / "report.html").read_text()
    before = sums(out)
    monkeypatch.setattr(perform, "_COMMANDS", {})  # a step that is not recognised would be a KeyError
    assert run(recipe(), out, RUN) == [base, one]
    assert sums(out) == before


@pytest.mark.slow
def test_each_variant_has_its_own_options_and_each_seed_its_own_run(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    variants = {
        "pissa": None,
        "lora": {"decompose": {"method": "lora"}, "train": {"lr": 0.02}},
        "full": {"decompose": {"method": "full", "rank": 64, "targets": "all-linear"}},
    }
    path = recipe(variants=variants, seeds=[5], steps=["train", "to-lora", "eval"])
    found = {one.run: one for one in run(path, tmp_path / "out", RUN)}
    assert [*found] == [
        "base",
        *(f"{name}-seed5" for name in ("pissa", "lora", "full")),
    ]
    assert {one.lr for one in found.values()} == {None, 0.01, 0.02}
    for name, one in found.items():
        if name == "base":
            continue
        manifest = read_manifest(tmp_path / "out" / name / "trained")
        assert (manifest.method, manifest.options["seed"]) == (one.method, one.seed)
        written = {path.name for path in (tmp_path / "out" / name).iterdir()}
        assert written == ({"trained"} if one.method == "full" else {"trained", "lora"})
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_run_continues_and_ends_with_the_same_bytes(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe(steps=["train", "to_lora", "eval"])
    run(path, tmp_path / "undisturbed", RUN)
    out = tmp_path / "out"
    process = start("run", path, "--threads", 1, "--device", "cpu", "-o", out)
    while process.poll() is None and not (out / "trained.partial" / "metrics.jsonl").exists():
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not (out / "results.json").exists()
    run(path, out, RUN)
    assert _without_times(out) == _without_times(tmp_path / "undisturbed")


def _without_times(directory: Path) -> dict[str, str]:
    """SHA-256 of all files but the results of eval, which hold seconds, and those that name the directory."""
    times = ("arithmetic.json", "svdconvert.json")
    return {name: found for name, found in sums(directory).items() if not name.endswith(times)}


@pytest.mark.slow
def test_another_recipe_is_refused_by_name_and_begins_anew_with_overwrite(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    short = recipe(merge="absent", to_lora="absent", eval="absent", report="absent")
    words = ("run", short, "-o", out, "--threads", 1, "--device", "cpu")
    succeeded(*words)
    refused(*words, "--set", "train.steps=2", words=[out, "train.steps was 3 and is 2", "--overwrite"])
    assert read_manifest(out / "trained").options["steps"] == 3
    assert json.loads(succeeded(*words, "--json").out) == json.loads((out / "results.json").read_text())
    succeeded(*words, "--set", "train.steps=2", "--overwrite")
    assert read_manifest(out / "trained").options["steps"] == 2
    notes = out / "trained" / "evaluations" / "notes.txt"
    notes.parent.mkdir()
    for name in ("notes.txt", "gsm8k.json", "gsm8k.jsonl"):
        notes.with_name(name).write_text("mine")
        refused(*words, "--overwrite", words=[notes.with_name(name), "was not written by svdconvert"])
        assert notes.with_name(name).read_text() == "mine"
        notes.with_name(name).unlink()
    (out / "trained" / "notes.txt").write_text("mine")
    refused(*words, "--overwrite", words=["notes.txt", "did not write"])
    assert (out / "trained" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": ["train", "evaluate"]}, ["steps", "evaluate", "did you mean eval?"]),
        ({"variants": {"../up": {}}}, ["../up", "cannot name a directory"]),
        ({"variants": {"base": {}}}, ["base", "cannot name a directory"]),
        ({"variants": {"Base": {}}}, ["Base", "cannot name a directory"]),
        ({"variants": {"REPORT.html": {}}}, ["REPORT.html", "cannot name a directory"]),
        ({"variants": {"A": {}, "a": {}}}, ["A and a, one directory on some disks"]),
        ({"variants": {"stra\u00dfe": {}, "STRASSE": {}}}, ["STRASSE, one directory on some disks"]),
        ({"variants": {"\u00e9": {}, "e\u0301": {}}}, ["one directory on some disks"]),
        ({"train": {"steps": 1}}, ["there is nothing to train on", "data"]),
        ({"train": {"data": "absent.jsonl"}}, ["absent.jsonl: there is no such file"]),
        ({"variants": {"a": {}, "b": {"train": {"data": "absent.jsonl"}}}}, ["absent.jsonl"]),
        ({"eval": {"tasks": "gsm8k", "data": "absent.jsonl"}}, ["absent.jsonl: there is no such file"]),
        ({"eval": {"tasks": "gsm8k,math", "data": "org/rows"}}, ["gsm8k, math are several"]),
        ({"eval": {"tasks": "mbpp"}}, ["mbpp runs what the model wrote", "--run-code"]),
        ({"variants": {"a": {"train": {"rate": 1}}}}, ["variants: a: train", "'rate'", "known:"]),
        ({"variants": []}, ["variants is not a mapping"]),
        ({"seeds": [1, 1]}, ["seeds", "different integers"]),
        ({"seeds": "12"}, ["seeds", "different integers"]),
        ({"eval": {"tasks": "gsm9k"}}, ["gsm9k", "did you mean gsm8k?"]),
        ({"eval": {"tasks": "gsm8k", "of": "merge"}}, ["of", "'merge'", "did you mean merged?"]),
        ({"merge": "absent", "eval": {"tasks": "gsm8k", "of": "merged"}}, ["of names merged"]),
        ({"eval": {"limit": 3}}, ["eval", "tasks"]),
        ({"model": None}, ["names no model", "--model"]),
        ({"eval": {"tasks": "humaneval", "run_code": True}}, ["run_code", "--run-code"]),
        ({"eval": {"tasks": "gsm8k", "regrade": True}}, ["regrade"]),
        ({"steps": ["eval"]}, ["nothing to run"]),
        ({"train": {"steps": -1}}, ["train", "steps is -1"]),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(
    changes: dict[str, Any], words: list[str], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe(**changes)
    sentence = refused("run", path, "-o", tmp_path / "out", words=words)
    assert str(path) in sentence or "gsm9k" in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("train.steps", ["--set train.steps", "KEY=VALUE"]),
        ("a.b.c=1", ["KEY=VALUE"]),
        ("trian.steps=1", ["'trian'", "did you mean train?"]),
        ("train.step=1", ["'step'", "did you mean steps?"]),
        ("train=3", ["train is not a mapping"]),
        ("variants=3", ["variants decides", "--set"]),
        ("seeds=[1, 1]", ["seeds is [1, 1]", "different integers"]),
        ("train.steps=[", ["YAML value"]),
    ],
)
def test_a_change_that_cannot_be_made_is_refused(
    given: str, words: list[str], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    refused("run", recipe(), "-o", tmp_path / "out", "--set", given, words=words)
    assert not (tmp_path / "out").exists()


def test_seeds_can_be_changed_but_not_a_single_one_next_to_them(recipe: Callable[..., Path]) -> None:
    read = read_recipe(recipe(seeds=[3, 4]))
    assert [variant.seed for variant, _ in variants_of(read, {"seeds": [7, 8, 9]})] == [7, 8, 9]
    with pytest.raises(RecipeError, match=r"seed changes nothing.* 3, 4; change seeds, such as seeds=\[5\]"):
        variants_of(read, {"seed": 5})
    assert [variant.seed for variant, _ in variants_of(read_recipe(recipe()), {"seeds": [2]})] == [2]


def test_a_directory_of_somebody_else_is_left_alone(recipe: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    for more in ((), ("--overwrite",)):
        refused("run", recipe(), "-o", tmp_path / "out", *more, words=[tmp_path / "out", "other files"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_only_run_takes_a_recipe_with_variants(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe(variants={"a": {}, "b": {}})
    refused("train", "--recipe", path, "-o", tmp_path / "out", words=["several variants", "svdconvert run"])
    shutil.rmtree(tmp_path / "recipes" / "model")
    refused("run", path, "-o", tmp_path / "out", words=["model"])
