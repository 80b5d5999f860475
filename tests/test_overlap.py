"""An input is never overwritten, not even with --overwrite."""

from collections.abc import Callable
from pathlib import Path

import pytest

from svdconvert.commands.decompose import decompose
from svdconvert.pipeline.decompose import SplitOptions
from tests.program import content, refused, succeeded
from tests.reading import readable, write_sums

Build = Callable[..., Path]


@pytest.fixture
def work(checkpoint: Build, tmp_path: Path) -> Path:
    """Holds `base`, `split` (what decompose made of it) and `merged`, which svdconvert wrote as well."""
    readable(checkpoint("llama"), tmp_path / "base")
    decompose(tmp_path / "base", tmp_path / "split", SplitOptions(rank=4))
    succeeded("merge", tmp_path / "split", "-o", tmp_path / "merged")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "source", "out"),
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
def test_an_output_that_overlaps_an_input_is_refused(command: str, source: str, out: str, work: Path) -> None:
    options = {
        "decompose": ["--rank", 4],
        "train": ["--data", write_sums(work / "sums.jsonl"), "--steps", 1, "--max-length", 64],
    }.get(command, [])
    before = content(work)
    refused(command, work / source, "-o", work / out, "--overwrite", *options, words=[work / out, "overlaps"])
    assert content(work) == before


def test_merging_over_the_base_is_refused(work: Path) -> None:
    decompose(work / "merged", work / "again", SplitOptions(rank=4))
    before = content(work)
    refused(
        "merge", work / "again", "-o", work / "merged", "--overwrite", words=[work / "merged", "overlaps"]
    )
    assert content(work) == before


@pytest.mark.parametrize("command", ["merge", "to-lora"])
def test_the_residual_of_a_trained_adapter_is_not_replaced(command: str, work: Path) -> None:
    sums = write_sums(work / "sums.jsonl")
    succeeded(
        "train", work / "split", "-o", work / "trained", "--data", sums, "--steps", 1, "--max-length", 64
    )
    before = content(work)
    refused(
        command, work / "trained", "-o", work / "split", "--overwrite", words=[work / "split", "overlaps"]
    )
    assert content(work) == before


def test_a_chosen_layout_that_fits_only_partly_is_refused(checkpoint: Build, tmp_path: Path) -> None:
    base = checkpoint("mixtral")
    command = ["decompose", base, "-o", tmp_path / "out", "--rank", 4, "--layout", "llama"]
    refused(*command, words=["layout llama does not fit", "mlp.gate, mlp.up, mlp.down"])


def test_a_missing_tokenizer_is_reported_before_the_data_are_read(
    checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    split = decomposed(checkpoint("llama"))
    sums = write_sums(tmp_path / "sums.jsonl")
    refused("train", split, "-o", tmp_path / "out", "--data", sums, words=[split, "holds no tokenizer"])
