"""What is read is never written over, not even with --overwrite."""

from collections.abc import Callable
from pathlib import Path

import pytest

from svdconvert.commands.decompose import decompose
from svdconvert.pipeline.decompose import SplitOptions
from tests.program import content, refused, succeeded
from tests.reading import readable, write_sums

Build = Callable[..., Path]


@pytest.fixture
def room(checkpoint: Build, tmp_path: Path) -> Path:
    """base, its decomposed directory, and that merged: a checkpoint that svdconvert wrote."""
    readable(checkpoint("llama"), tmp_path / "base")
    decompose(tmp_path / "base", tmp_path / "split", SplitOptions(rank=4))
    succeeded("merge", tmp_path / "split", "-o", tmp_path / "merged")
    return tmp_path


@pytest.mark.parametrize(
    ("verb", "source", "out"),
    [
        ("decompose", "merged", "merged"),
        ("decompose", "base", "base/inside"),
        ("merge", "split", "split"),
        ("merge", "split", "split/inside"),
        ("to-lora", "split", "split"),
        ("to-lora", "split", "split/pissa_init/inside"),
        ("train", "split", "split"),
    ],
)
def test_an_output_that_overlaps_an_input_is_refused(verb: str, source: str, out: str, room: Path) -> None:
    options = {
        "decompose": ["--rank", 4],
        "train": ["--data", write_sums(room / "sums.jsonl"), "--steps", 1, "--max-length", 64],
    }.get(verb, [])
    before = content(room)
    refused(verb, room / source, "-o", room / out, "--overwrite", *options, words=[room / out, "overlaps"])
    assert content(room) == before


def test_merging_over_the_base_is_refused(room: Path) -> None:
    decompose(room / "merged", room / "again", SplitOptions(rank=4))
    before = content(room)
    refused(
        "merge", room / "again", "-o", room / "merged", "--overwrite", words=[room / "merged", "overlaps"]
    )
    assert content(room) == before


@pytest.mark.parametrize("verb", ["merge", "to-lora"])
def test_the_residual_of_a_trained_adapter_is_not_replaced(verb: str, room: Path) -> None:
    sums = write_sums(room / "sums.jsonl")
    succeeded(
        "train", room / "split", "-o", room / "trained", "--data", sums, "--steps", 1, "--max-length", 64
    )
    before = content(room)
    refused(verb, room / "trained", "-o", room / "split", "--overwrite", words=[room / "split", "overlaps"])
    assert content(room) == before


def test_a_layout_that_fits_in_part_is_refused_when_insisted_on(checkpoint: Build, tmp_path: Path) -> None:
    base = checkpoint("mixtral")
    command = ["decompose", base, "-o", tmp_path / "out", "--rank", 4, "--layout", "llama"]
    refused(*command, words=["layout llama does not fit", "mlp.gate, mlp.up, mlp.down"])


def test_a_model_without_a_tokenizer_is_named_before_its_data(
    checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    split = decomposed(checkpoint("llama"))
    sums = write_sums(tmp_path / "sums.jsonl")
    refused("train", split, "-o", tmp_path / "out", "--data", sums, words=[split, "holds no tokenizer"])
