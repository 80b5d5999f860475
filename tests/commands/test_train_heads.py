"""Encoders with a head: classes and numbers, and what stock transformers and PEFT make of the results."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from svdconvert import Run, SplitOptions, TrainOptions, decompose, merge, read_manifest, to_lora, train
from svdconvert.errors import DataError, MissingPackageError
from svdconvert.publish.card import CardContext, write_card
from svdconvert.publish.files import SourceRepos
from tests.conftest import Build
from tests.program import content, refused, succeeded
from tests.reading import readable
from tests.stock import same_bytes, tensors

STEPS = {"steps": 60, "batch_size": 8, "max_length": 16, "lr": 1e-2, "eval_rows": 16, "eval_every": 30}


def rows() -> list[dict[str, Any]]:
    """Pluses and equals signs: which are more is a class, and their share a number."""
    counts = [count for count in (0, 1, 5, 6) for _ in range(18)]
    random.Random(0).shuffle(counts)
    return [
        {
            "sentence1": " ".join(["+"] * count + ["="] * (6 - count)),
            "sentence2": "what is ?",
            "label": "large" if count > 3 else "small",
            "score": count / 3 - 1,
        }
        for count in counts
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As .jsonl, .csv and .tsv under one name."""
    place = tmp_path_factory.mktemp("data") / "rows.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    for ending, mark in ((".csv", ","), (".tsv", "\t")):
        lines = [mark.join(rows()[0]), *(mark.join(map(str, row.values())) for row in rows())]
        place.with_suffix(ending).write_text("\n".join(lines) + "\n")
    return place


@pytest.fixture(scope="module")
def chain(
    checkpoint: Build, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """(model_type, task) -> a directory with base, start, trained, merged and lora; made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(model_type: str, task: str) -> Path:
        if (model_type, task) not in made:
            home = tmp_path_factory.mktemp(f"{model_type}-{task}")
            base = body(checkpoint(model_type, dtype=torch.float32), home / "base")
            decompose(base, home / "start", SplitOptions(rank=4), Run(threads=1))
            label = {"label_field": "score"} if task == "regress" else {}
            options = TrainOptions(data=str(data), task=task, **STEPS, **label, precision="fp32")
            train(home / "start", home / "trained", options, Run(threads=1))
            merge(home / "trained", home / "merged", run=Run(threads=1))
            to_lora(home / "trained", home / "lora")
            made[model_type, task] = home
        return made[model_type, task]

    return make


def body(checkpoint: Path, directory: Path) -> Path:
    """The encoder without a head and without the prefix of its names, as MiniLM is published."""
    readable(checkpoint, directory)
    prefix = {"bert": "bert.", "roberta": "roberta."}[AutoConfig.from_pretrained(directory).model_type]
    stored = load_file(directory / "model.safetensors")
    own = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
    if prefix == "bert.":
        save_file(own, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def metrics(trained: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]


def object_in(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def logits(model: PreTrainedModel, home: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    inputs = tokenizer([["+ + =", "2 + 1"], ["= = = = =", "4"]], padding=True, return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


every_encoder = pytest.mark.parametrize("model_type", ["bert", "roberta"])
every_task = pytest.mark.parametrize(("task", "outputs"), [("classify", 2), ("regress", 1)])


@pytest.mark.slow
@every_encoder
@every_task
def test_merged_lora_and_trained_are_one_model(
    model_type: str, task: str, outputs: int, chain: Callable[[str, str], Path]
) -> None:
    home = chain(model_type, task)
    kind = AutoModelForSequenceClassification
    merged, loaded = kind.from_pretrained(home / "merged", output_loading_info=True)
    assert not loaded["missing_keys"]
    expected = logits(merged, home)
    assert expected.shape == (2, outputs)
    on_base = PeftModel.from_pretrained(
        kind.from_pretrained(home / "base", num_labels=outputs), home / "lora"
    )
    torch.testing.assert_close(logits(on_base, home), expected, rtol=1e-4, atol=1e-5)
    residual = kind.from_pretrained(home / "start", num_labels=outputs)
    trained = PeftModel.from_pretrained(residual, home / "trained")
    torch.testing.assert_close(logits(trained, home), expected, rtol=1e-4, atol=1e-5)


@every_encoder
def test_a_classifier_learns_and_is_scored(model_type: str, chain: Callable[[str, str], Path]) -> None:
    home = chain(model_type, "classify")
    held_out = [line for line in metrics(home / "trained") if "eval_loss" in line]
    assert [line["step"] for line in held_out] == [0, 30, 60]
    assert all(line.keys() == {"step", "eval_loss", "accuracy", "f1", "matthews"} for line in held_out)
    assert held_out[-1]["accuracy"] > 0.9
    config = json.loads((home / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "large", "1": "small"}
    assert config["architectures"][0].endswith("ForSequenceClassification")


@every_encoder
def test_a_regressor_learns_and_is_scored(model_type: str, chain: Callable[[str, str], Path]) -> None:
    held_out = [line for line in metrics(chain(model_type, "regress") / "trained") if "eval_loss" in line]
    assert held_out[-1].keys() == {"step", "eval_loss", "pearson", "spearman"}
    assert held_out[-1]["pearson"] > 0.9
    assert held_out[-1]["eval_loss"] < 0.5 * held_out[0]["eval_loss"]


@every_encoder
def test_the_scores_are_those_of_the_merged_model(model_type: str, chain: Callable[[str, str], Path]) -> None:
    home = chain(model_type, "classify")
    model = AutoModelForSequenceClassification.from_pretrained(home / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    held_out = rows()[-16:]
    inputs = tokenizer(
        [[row["sentence1"], row["sentence2"]] for row in held_out], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        guesses = model(**inputs).logits.argmax(dim=1).tolist()
    right = [
        model.config.id2label[guess] == row["label"] for guess, row in zip(guesses, held_out, strict=True)
    ]
    assert metrics(home / "trained")[-1 if "accuracy" in metrics(home / "trained")[-1] else -2][
        "accuracy"
    ] == pytest.approx(sum(right) / 16)


def test_every_kind_of_file_gives_the_same_classifier(
    chain: Callable[[str, str], Path], data: Path, tmp_path: Path
) -> None:
    home = chain("bert", "classify")
    for ending in (".csv", ".tsv"):
        out = tmp_path / ending[1:]
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in STEPS.items()]
        more = [
            "--task",
            "classify",
            "--data",
            data.with_suffix(ending),
            "--precision",
            "fp32",
            "--threads",
            1,
        ]
        succeeded("train", home / "start", "-o", out, *arguments, *more)
        assert same_bytes(tensors(out), tensors(home / "trained"))


def test_a_resumed_run_continues_with_its_head(
    chain: Callable[[str, str], Path], data: Path, tmp_path: Path
) -> None:
    home = chain("bert", "classify")

    def watch(log: Any, steps: int) -> None:
        if log.step == 45:
            raise KeyboardInterrupt

    options = TrainOptions(data=str(data), task="classify", **STEPS, precision="fp32", save_every=20)
    with pytest.raises(KeyboardInterrupt):
        train(home / "start", tmp_path / "out", options, Run(threads=1), watch=watch)
    train(home / "start", tmp_path / "out", options, Run(threads=1))
    assert content(tmp_path / "out") == content(home / "trained")


def test_verify_accepts_the_head_and_the_manifest_describes_it(chain: Callable[[str, str], Path]) -> None:
    home = chain("roberta", "classify")
    for name in ("trained", "merged", "lora"):
        assert "agrees with its manifest" in succeeded("verify", home / name).out
    head = read_manifest(home / "trained").head
    assert head["id2label"] == {"0": "large", "1": "small"}
    stored = load_file(home / "trained" / "adapter_model.safetensors")
    assert any(".classifier." in name for name in stored)


def test_the_class_that_loads_a_classifier_is_named(
    chain: Callable[[str, str], Path], tmp_path: Path
) -> None:
    home = chain("bert", "classify")
    for said in (
        succeeded("merge", home / "trained", "-o", tmp_path / "m"),
        succeeded("inspect", tmp_path / "m"),
    ):
        assert "AutoModelForSequenceClassification.from_pretrained(" in said.out
    for kind in ("trained", "lora", "merged"):
        config, adapter = (object_in(home / kind / f"{name}.json") for name in ("config", "adapter_config"))
        facts = CardContext(
            repository="me/it",
            revision=None,
            repos=SourceRepos(None, None),
            config=config,
            adapter=adapter,
            inherited={},
        )
        card = write_card(read_manifest(home / kind), facts)
        assert "pipeline_tag: text-classification" in card
        assert "AutoModelForCausalLM" not in card


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "arguments", "complaint"),
    [
        ({"sentence1": "a", "sentence2": "b"}, {}, "row 2: it has no label"),
        ({"sentence1": "a", "sentence2": "b", "label": ""}, {}, "row 2: it has no label"),
        ({"sentence1": "a", "label": "small"}, {}, "row 2: its sentence2 is not text but NoneType"),
        (
            {"sentence1": "a", "sentence2": "b", "label": "x"},
            {"task": "regress"},
            "row 1: its label is 'small'",
        ),
        ({}, {"text_fields": "body"}, "row 1: there is no field body"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    row: dict[str, Any],
    arguments: dict[str, Any],
    complaint: str,
    chain: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    good = {"sentence1": "a", "sentence2": "b", "label": "small"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    options = TrainOptions(**{"data": str(tmp_path / "rows.jsonl"), "task": "classify", **arguments})
    with pytest.raises(DataError, match=complaint):
        train(chain("bert", "classify") / "start", tmp_path / "out", options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_held_out_label_without_a_class_is_named(
    chain: Callable[[str, str], Path], data: Path, tmp_path: Path
) -> None:
    row = {"sentence1": "a", "sentence2": "b", "label": "huge"}
    (tmp_path / "eval.jsonl").write_text(json.dumps(row) + "\n")
    options = TrainOptions(data=str(data), eval_data=str(tmp_path / "eval.jsonl"), task="classify")
    with pytest.raises(DataError, match=r"eval.jsonl: row 1: its label 'huge' is not one of large, small"):
        train(chain("bert", "classify") / "start", tmp_path / "out", options)


def test_without_scikit_learn_the_extra_to_install_is_named(
    chain: Callable[[str, str], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdconvert.training.optim.heads.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"svdconvert\[scores\]"):
        train(
            chain("bert", "classify") / "start",
            tmp_path / "out",
            TrainOptions(data=str(data), task="regress"),
        )


def test_options_for_texts_are_refused_for_classifiers(tmp_path: Path) -> None:
    arguments = ("--task", "classify", "--data", "x", "--packing")
    refused("train", "x", "-o", tmp_path / "out", *arguments, words=["packing", "are for texts"])


def test_what_peft_saves_of_a_classifier_is_merged_too(
    chain: Callable[[str, str], Path], tmp_path: Path
) -> None:
    home = chain("bert", "classify")
    kind = AutoModelForSequenceClassification
    stock = PeftModel.from_pretrained(kind.from_pretrained(home / "base", num_labels=2), home / "lora")
    expected = logits(stock, home)
    stock.save_pretrained(tmp_path / "foreign")
    merge(tmp_path / "foreign", tmp_path / "out", base=str(home / "base"), init="none")
    torch.testing.assert_close(logits(kind.from_pretrained(tmp_path / "out"), home), expected)
