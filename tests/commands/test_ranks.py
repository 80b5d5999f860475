"""Several processes share the work of one output, and write the bytes that one process writes."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from svdconvert.output.ownership import staging_directory
from tests import medium
from tests.process import finish, start, sums, wait_until_finished

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "svdconvert"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "-m", "svdconvert"]

NF4 = ("--residual-format", "nf4", "--double-quant", "--quant-iterations", 2)
formats = pytest.mark.parametrize(
    "residual", [(), pytest.param(NF4, marks=pytest.mark.sweep)], ids=["plain", "nf4"]
)

pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return medium.build(tmp_path_factory.mktemp("model") / "base", layers=8)


@formats
def test_two_ranks_write_the_bytes_of_one(model: Path, tmp_path: Path, residual: tuple[object, ...]) -> None:
    options = ["--rank", 8, "--max-shard-size", "100KB" if residual else "300KB", *residual]
    finish(start("decompose", model, "-o", tmp_path / "one", *options))
    finish(start("decompose", model, "-o", tmp_path / "two", *options, program=TORCHRUN))
    assert sums(tmp_path / "two") == sums(tmp_path / "one")
    finish(start("merge", tmp_path / "one", "-o", tmp_path / "merged"))
    finish(start("merge", tmp_path / "one", "-o", tmp_path / "merged-by-two", program=TORCHRUN))
    assert sums(tmp_path / "merged-by-two") == sums(tmp_path / "merged")
    both = ["combine", model, tmp_path / "merged", "--base", model, "--method", "dare-ties", "--density", 0.5]
    weights = ["--weights", "0.5", "--max-shard-size", "300KB"]
    finish(start(*both, "-o", tmp_path / "combined", *weights))
    finish(start(*both, "-o", tmp_path / "combined-by-two", *weights, program=TORCHRUN))
    assert sums(tmp_path / "combined-by-two") == sums(tmp_path / "combined")


@pytest.mark.sweep
def test_two_ranks_extract_the_bytes_of_one(model: Path, tmp_path: Path) -> None:
    tuned = medium.build(tmp_path / "tuned", layers=8, seed=1)
    for rule in (["--rank", 8], ["--rank-budget", 100], ["--tol", 0.6, "--keep", "none"]):
        words = ["extract", model, tuned, *rule, "--dtype", "bfloat16"]
        name = rule[0]
        finish(start(*words, "-o", tmp_path / f"one{name}"))
        finish(start(*words, "-o", tmp_path / f"two{name}", program=TORCHRUN))
        assert sums(tmp_path / f"two{name}") == sums(tmp_path / f"one{name}")


def test_two_matrices_at_once_have_the_bytes_of_one_after_the_other(model: Path, tmp_path: Path) -> None:
    for threads in (1, 2):
        out = tmp_path / f"{threads}"
        finish(start("decompose", model, "-o", out / "pissa", "--rank", 8, "--threads", threads))
        finish(
            start("merge", out / "pissa", "-o", out / "merged", "--from", "residual", "--threads", threads)
        )
    one, two = sums(tmp_path / "1"), sums(tmp_path / "2")
    assert one.keys() == two.keys()
    manifests = {name for name in one if name.endswith("svdconvert.json")}  # which record the threads
    assert {name for name in one if one[name] != two[name]} <= manifests


@formats
def test_a_killed_rank_ends_the_run_and_one_process_can_finish_it(
    model: Path, tmp_path: Path, residual: tuple[object, ...]
) -> None:
    out = tmp_path / "out"
    options = ["--rank", 8, "--max-shard-size", "300KB", *residual]
    launcher = start("decompose", model, "-o", out, *options, program=TORCHRUN)
    wait_until_finished(launcher, out, 4)
    _kill_rank(launcher.pid, "1")
    _, said = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    assert f"continues from {out}.partial" in said or "another rank died" in said
    assert staging_directory(out).exists() and not out.exists()
    assert "are done" in finish(start("decompose", model, "-o", out, *options))
    finish(start("decompose", model, "-o", tmp_path / "whole", *options))
    assert sums(out) == sums(tmp_path / "whole")


def test_fewer_ranks_than_the_launcher_was_asked_for_are_refused(model: Path, tmp_path: Path) -> None:
    process = start("decompose", model, "-o", tmp_path / "out", "--rank", 8, program=ACCELERATE)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "2 ranks were requested and 1 runs" in said
    assert not (tmp_path / "out").exists() and not staging_directory(tmp_path / "out").exists()


def test_to_lora_refuses_more_than_one_rank(model: Path, tmp_path: Path) -> None:
    finish(start("decompose", model, "-o", tmp_path / "one", "--rank", 8))
    process = start("to-lora", tmp_path / "one", "-o", tmp_path / "lora", program=TORCHRUN)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "to-lora runs in one process" in said


def _kill_rank(launcher: int, index: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for child in psutil.Process(launcher).children(recursive=True):
            if child.environ().get("RANK") == index:
                os.kill(child.pid, signal.SIGKILL)
                return
        time.sleep(0.01)
    raise AssertionError(f"rank {index} was not found")
