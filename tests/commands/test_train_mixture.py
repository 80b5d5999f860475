"""Training on several data sets, from the command line to the manifest, with an interruption."""

import json
from pathlib import Path

import pytest
import torch

from svdconvert import Run, SplitOptions, TrainOptions, decompose, train
from tests.conftest import Build
from tests.program import content, refused, succeeded
from tests.reading import readable, write_sums

WORDS = ["--steps", 6, "--save-every", 2, "--batch-size", 2, "--max-length", 48, "--precision", "fp32"]


@pytest.fixture
def start(checkpoint: Build, tmp_path: Path) -> Path:
    base = readable(checkpoint("llama", dtype=torch.float32), tmp_path / "base")
    decompose(base, tmp_path / "start", SplitOptions(rank=2), Run(device="cpu"))
    write_sums(tmp_path / "a.jsonl", rows=8)
    write_sums(tmp_path / "b.jsonl", rows=3)
    return tmp_path / "start"


def test_shares_change_the_result_and_are_in_the_manifest(start: Path, tmp_path: Path) -> None:
    data = ["--data", tmp_path / "a.jsonl", "--data", tmp_path / "b.jsonl"]
    said = succeeded("train", start, "-o", tmp_path / "mixed", *data, "--data-weights", "1,4", *WORDS).err
    assert "8 rows of" in said and "32 rows of" in said
    succeeded("train", start, "-o", tmp_path / "together", *data, *WORDS)
    options = json.loads((tmp_path / "mixed" / "svdconvert.json").read_text())["options"]
    assert options["data"] == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert options["data_weights"] == [0.2, 0.8]
    weights = "adapter_model.safetensors"
    assert (tmp_path / "mixed" / weights).read_bytes() != (tmp_path / "together" / weights).read_bytes()


def test_an_interrupted_run_continues_with_the_same_rows(start: Path, tmp_path: Path) -> None:
    names = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    options = TrainOptions(
        data=names, data_weights="1,4", steps=6, save_every=2, batch_size=2, max_length=48, precision="fp32"
    )
    train(start, tmp_path / "whole", options, Run(threads=1))

    def stop(log: object, steps: int) -> None:
        if getattr(log, "step", 0) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(start, tmp_path / "twice", options, Run(threads=1), watch=stop)
    notes: list[str] = []
    train(start, tmp_path / "twice", options, Run(threads=1, notify=notes.append))
    assert any("steps are done" in note for note in notes)
    assert content(tmp_path / "twice") == content(tmp_path / "whole")


def test_shares_of_one_data_set_are_refused(start: Path, tmp_path: Path) -> None:
    words = ["--data", tmp_path / "a.jsonl", "--data-weights", "1"]
    refused("train", start, "-o", tmp_path / "out", *words, words=["--data-weights", "give --data several"])
