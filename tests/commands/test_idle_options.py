"""An option that is given changes the result, or is refused; none is ignored."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from svdconvert import Run, SplitOptions, decompose, merge
from tests.commands.test_extract import tuned_from
from tests.conftest import Build
from tests.program import content, refused, succeeded, svdconvert
from tests.stock import trained_from

RUN = Run(device="cpu")


def files(directory: Path) -> dict[str, bytes]:
    """Everything that a directory holds, except the manifest, which records the options."""
    return {name: data for name, data in content(directory).items() if name != "svdconvert.json"}


CHANGES: dict[str, list[tuple[list[Any], list[Any]]]] = {
    "decompose": [
        ([], ["--method", "milora"]),
        (["--method", "lora-fa"], ["--init", "random"]),
        ([], ["--rank", 3]),
        ([], ["--alpha", 8]),
        ([], ["--rank-pattern", "attn.q=2"]),
        ([], ["--alpha-pattern", "attn.q=2"]),
        (["--alpha", 8], ["--rslora"]),
        ([], ["--dropout", 0.1]),
        ([], ["--targets", "attn"]),
        ([], ["--dtype", "bfloat16"]),
        ([], ["--residual-dtype", "float32"]),
        ([], ["--max-shard-size", "8KB"]),
        (["--method", "lora"], ["--copy-base"]),
        (["--method", "lora"], ["--seed", 3]),
    ],
    "merge": [
        ([], ["--dtype", "float32"]),
        ([], ["--rounding", "stochastic"]),
        (["--rounding", "stochastic"], ["--seed", 3]),
        ([], ["--max-shard-size", "8KB"]),
        (["--from", "base"], ["--dtype", "float16"]),
    ],
    "to-lora": [
        ([], ["--dtype", "bfloat16"]),
        ([], ["--rank", 2]),
        ([], ["--tol", 0.5]),
        ([], ["--rank-budget", 30]),
    ],
}


@pytest.fixture
def source(checkpoint: Build, decomposed: Build, tmp_path: Path) -> dict[str, Path]:
    """An input for each command: a model, and an adapter with a delta."""
    base = checkpoint("llama")
    out = Path(shutil.copytree(decomposed(base), tmp_path / "split"))
    trained = trained_from(out, tmp_path / "trained")
    return {"decompose": base, "merge": trained, "to-lora": trained, "residual": out}


@pytest.mark.parametrize(
    ("command", "common", "option"),
    [(command, *row) for command, rows in CHANGES.items() for row in rows],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else value,
)
def test_an_option_that_is_given_changes_the_files(
    command: str, common: list[Any], option: list[Any], source: dict[str, Path], tmp_path: Path
) -> None:
    fixed = ["--residual", source["residual"]] if command != "decompose" else []
    rank = ["--rank", 4] if command == "decompose" else []
    ranks = [] if "--rank" in option else rank
    succeeded(command, source[command], "-o", tmp_path / "one", *fixed, *rank, *common)
    succeeded(command, source[command], "-o", tmp_path / "two", *fixed, *ranks, *common, *option)
    assert files(tmp_path / "one") != files(tmp_path / "two")


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "lora", "--residual-dtype", "float32"],
        ["--method", "pissa", "--copy-base"],
        ["--method", "lora", "--svd", "exact"],
        ["--method", "olora", "--tol", 0.01],
        ["--svd", "exact", "--tol", 0.01],
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_an_option_of_decompose_without_effect_is_refused(
    words: list[Any], checkpoint: Build, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused("decompose", checkpoint("llama"), "-o", out, "--rank", 4, *words, words=["changes nothing"])
    assert list(tmp_path.iterdir()) == []


def test_an_option_of_merge_without_effect_is_refused(
    checkpoint: Build, source: dict[str, Path], tmp_path: Path
) -> None:
    words = ["merge", source["merge"], "-o", tmp_path / "out", "--residual", source["residual"]]
    refused(*words, "--seed", 3, words=["--seed changes nothing"])
    refused(*words, "--dtype", "float32", "--rounding", "stochastic", words=["--rounding stochastic changes"])


@pytest.mark.parametrize("command", ["merge", "to-lora", "verify"])
def test_a_wrong_base_is_refused_even_if_it_is_not_read(
    command: str, checkpoint: Build, tmp_path: Path
) -> None:
    base, other = checkpoint("llama"), checkpoint("qwen2")
    decompose(base, tmp_path / "split", SplitOptions(rank=4), RUN)
    directory = tmp_path / "split"
    if command == "verify":
        directory = tmp_path / "merged"
        merge(tmp_path / "split", directory, run=RUN)
    out = [] if command == "verify" else ["-o", tmp_path / "out"]
    refused(command, directory, *out, "--base", other, words=["is not the model"])


def test_a_location_that_nothing_needs_is_refused(checkpoint: Build, tmp_path: Path) -> None:
    base = checkpoint("llama", dtype=torch.float32)
    decompose(base, tmp_path / "split", SplitOptions(rank=4, method="lora"), RUN)
    words = ["merge", tmp_path / "split", "-o", tmp_path / "out", "--residual", tmp_path / "split"]
    refused(*words, words=["--residual"])


@pytest.mark.parametrize(
    "words",
    [
        ["decompose", "m", "-o", "x", "--rank", 1, "--rank", 2],
        ["merge", "a", "-o", "x", "-o", "y"],
        ["to-lora", "a", "-o", "x", "--dtype", "float32", "--dtype", "bfloat16"],
        ["inspect", "a", "--json", "--json"],
    ],
    ids=lambda words: words[0],
)
def test_a_repeated_option_is_refused(words: list[Any]) -> None:
    ended = svdconvert(*words)
    assert ended.status == 2
    assert "give it once" in ended.err


@pytest.mark.parametrize("option", ["--rank", "--rank-budget"])
@pytest.mark.parametrize("command", ["to-lora", "combine", "extract", "decompose"])
def test_a_rank_that_no_matrix_has_is_refused(
    command: str, option: str, source: dict[str, Path], tmp_path: Path
) -> None:
    """The highest rank is that of the smaller side of the widest matrix, or of the exact factors."""
    if (command, option) == ("decompose", "--rank-budget"):
        pytest.skip("decompose has no budget")
    trained = [source["merge"], "--residual", source["residual"]]
    lora = tmp_path / "lora"
    succeeded("to-lora", *trained, "-o", lora)
    words = {
        "to-lora": trained,
        "combine": [lora, lora],
        "extract": [source["decompose"], tuned_from(source["decompose"], tmp_path / "tuned")],
        "decompose": [source["decompose"]],
    }[command]
    said = "or leave it out" if command in ("to-lora", "combine") else "or less"
    refused(command, *words, "-o", tmp_path / "out", option, 100_000, words=["100000", said])
    assert not (tmp_path / "out").exists()


def test_a_merge_that_changes_nothing_says_so(source: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "those from before training" in succeeded("merge", source["residual"], "-o", out).err
    succeeded("to-lora", source["merge"], "-o", tmp_path / "lora", "--residual", source["residual"])
    words = ["merge", tmp_path / "lora", "-o", tmp_path / "zero", "--base", source["decompose"]]
    assert "the weighted changes cancel" in succeeded(*words, "--weights", "0").err
    words[3] = tmp_path / "full"
    assert "those of the base" not in succeeded(*words).err


def test_a_start_that_is_recorded_is_not_declared_to_be_zero(source: dict[str, Path], tmp_path: Path) -> None:
    trained, base = source["merge"], source["decompose"]
    succeeded("to-lora", trained, "-o", tmp_path / "lora", "--residual", source["residual"])
    shutil.copytree(tmp_path / "lora", tmp_path / "foreign")
    (tmp_path / "foreign" / "svdconvert.json").unlink()
    out = tmp_path / "out"
    said = ["--init none changes nothing", "records how it started"]
    known: list[list[Any]] = [
        ["merge", tmp_path / "lora", "--base", base],
        ["merge", trained, "--residual", source["residual"]],
        ["merge", trained, "--residual", source["residual"], "--weights", "0.5", "--base", base],
        ["to-lora", tmp_path / "lora"],
        ["combine", tmp_path / "lora", tmp_path / "lora"],
    ]
    for words in known:
        refused(*words, "-o", out, "--init", "none", words=said)
    succeeded("combine", tmp_path / "lora", tmp_path / "foreign", "-o", out, "--init", "none")
    succeeded("to-lora", tmp_path / "foreign", "-o", tmp_path / "one", "--init", "none")
