"""Classifiers are asked as stock transformers asks them, trained, merged or as a LoRA."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from svdconvert import LoraOptions, MergeOptions, SplitOptions, TrainOptions, decompose, merge, to_lora, train
from svdconvert.errors import SvdConvertError
from svdconvert.training.compat import reset_accelerate_state
from tests.conftest import Build
from tests.evaluation.directories import CPU, answers_in, asked
from tests.reading import readable


def pairs() -> list[dict[str, object]]:
    """Rows with MRPC's fields, of different lengths: are there more pluses than equals signs?"""
    counts = [(plus, number) for number in range(5) for plus in (0, 1, 5, 6)]
    return [
        {
            "sentence1": " ".join(["+"] * plus + ["="] * (6 - plus)),
            "sentence2": "what is ?" * number,
            "label": int(plus > 3),
        }
        for plus, number in counts
    ]


@pytest.fixture(scope="module")
def home(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT's classifier as TRAINED, MERGED and LORA."""
    home = tmp_path_factory.mktemp("home")
    readable(checkpoint("bert", dtype=torch.float32), home / "base")
    data = home / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    decompose(home / "base", home / "start", SplitOptions(rank=4), CPU)
    plan = TrainOptions(
        data=str(data), task="classify", steps=60, batch_size=8, max_length=16, lr=1e-2, precision="fp32"
    )
    train(home / "start", home / "trained", plan, CPU)
    merge(home / "trained", home / "merged", MergeOptions(), CPU)
    to_lora(home / "trained", home / "lora", LoraOptions(), CPU)
    reset_accelerate_state()
    return home


@pytest.fixture(autouse=True)
def _reset_accelerate() -> Iterator[None]:
    yield
    reset_accelerate_state()


def test_every_form_of_a_classifier_predicts_what_stock_transformers_predicts(
    home: Path, tmp_path: Path
) -> None:
    network = AutoModelForSequenceClassification.from_pretrained(home / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(home / "merged")
    expected = []
    for row in pairs():
        inputs = tokenizer(row["sentence1"], row["sentence2"] or None, return_tensors="pt")
        expected.append(network.config.id2label[int(network(**inputs).logits.argmax())])
    assert len(set(expected)) == 2
    right = sum(int(guess) == row["label"] for guess, row in zip(expected, pairs(), strict=True))
    for kind in ("merged", "trained", "lora"):
        result = asked(home / kind, home / "rows.jsonl", tmp_path / kind, ("mrpc",), max_new_tokens=None)
        assert [line["answer"] for line in answers_in(tmp_path / kind, "mrpc")] == expected
        assert result.grades["strict"].correct == right
        assert result.metrics["accuracy"] == right / 20
        assert "f1" in result.metrics


def test_a_classifier_without_a_trained_head_is_refused(home: Path, tmp_path: Path) -> None:
    config = json.loads((home / "base" / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    readable(home / "base", tmp_path / "headless")
    (tmp_path / "headless" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SvdConvertError, match="drawn at random"):
        asked(tmp_path / "headless", home / "rows.jsonl", tmp_path / "out", ("mrpc",), max_new_tokens=None)


def test_a_classifier_does_not_write_text(home: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1", "answer": "#### 1"}\n')
    with pytest.raises(SvdConvertError, match="is a classifier"):
        asked(home / "merged", data, tmp_path / "out")
