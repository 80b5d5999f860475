"""Killed at any moment, the same command goes on and ends in the same bytes."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from svdconvert.commands.decompose import decompose
from svdconvert.config.execution import Run
from svdconvert.output.staging import partial
from svdconvert.pipeline.decompose import SplitOptions
from tests import medium
from tests.process import finish, finished_items, start, sums, wait_until_finished

KILLS = int(os.environ.get("SVDCONVERT_KILLS", "5"))
"""Kills for each verb; `make soak` wants more."""
SLOW: tuple[object, ...] = ("decompose", "--svd", "exact", "--rank", 8)
"""A command that takes its time."""
ITEMS = {"decompose": 57, "merge": 57, "to-lora": 56}
"""Tensors of the base, or adapted modules: 8 layers of 7 matrices, and the embedding."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return medium.build(tmp_path_factory.mktemp("model") / "base", layers=8, hidden=256, wide=704)


@pytest.fixture(scope="module")
def decomposed(model: Path) -> Path:
    out = model.with_name("decomposed")
    decompose(model, out, SplitOptions(rank=8), Run(threads=1))
    return out


def _command(verb: str, model: Path, decomposed: Path) -> list[object]:
    if verb == "decompose":
        return [verb, model, "--rank", 8, "--max-shard-size", "1MB"]
    return [verb, decomposed, *(["--max-shard-size", "1MB"] if verb == "merge" else [])]


@pytest.mark.parametrize("verb", ITEMS)
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(
    verb: str, model: Path, decomposed: Path, tmp_path: Path
) -> None:
    command = _command(verb, model, decomposed)
    whole, out = tmp_path / "whole", tmp_path / "out"
    finish(start(*command, "-o", whole))
    moments = sorted(random.Random(verb).choices(range(ITEMS[verb]), k=KILLS))
    for moment in moments:
        process = start(*command, "-o", out)
        wait_until_finished(process, out, moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert out.exists() or not (out / "svdconvert.json").exists()
        if out.exists():  # it was faster than the kill, and has to be whole
            break
    if not out.exists():
        done = finished_items(out)
        said = finish(start(*command, "-o", out))
        assert done == 0 or f"{done} of {ITEMS[verb]} tensors are done" in said or verb == "to-lora"
    assert sums(out) == sums(whole)
    assert not partial(out).exists()


def test_ctrl_c_leaves_a_state_to_go_on_from_and_says_so(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, said = _interrupted(model, out, signal.SIGINT)
    assert status == 130, said
    assert f"the same command continues from {out}.partial" in said
    assert not out.exists()
    assert "tensors are done" in finish(start(*SLOW, model, "-o", out))


def test_a_run_that_is_told_to_end_says_where_it_can_go_on(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, said = _interrupted(model, out, signal.SIGTERM)
    assert status == 143, said
    assert f"continues from {out}.partial" in said


@pytest.mark.parametrize(
    ("change", "named"), [(["--rank", 7], "options.rank was 8 and is 7"), (["--seed", 1], "options.seed")]
)
def test_another_option_is_refused_by_name(
    model: Path, tmp_path: Path, change: list[object], named: str
) -> None:
    out = tmp_path / "out"
    _interrupted(model, out)
    process = start(*SLOW, model, "-o", out, *change)
    _, said = process.communicate()
    assert process.returncode == 1
    assert named in said and "--overwrite" in said
    assert partial(out).exists()


def test_a_changed_source_is_refused_by_name(tmp_path: Path) -> None:
    model, out = medium.build(tmp_path / "base", layers=8, hidden=256, wide=704), tmp_path / "out"
    _interrupted(model, out)
    os.utime(model / "model-00002-of-00005.safetensors")
    process = start(*SLOW, model, "-o", out)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "model-00002-of-00005.safetensors has changed" in said
    said = finish(start(*SLOW, model, "-o", out, "--overwrite"))
    assert "are done" not in said


def test_a_file_that_was_removed_from_the_unfinished_output_is_made_again(
    model: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    finish(start(*SLOW, model, "-o", whole))
    _interrupted(model, out)
    (partial(out) / "model.safetensors").unlink()
    finish(start(*SLOW, model, "-o", out))
    assert sums(out) == sums(whole)


def test_a_second_run_for_the_same_output_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(*SLOW, model, "-o", out)
    wait_until_finished(first, out, 1)
    os.kill(first.pid, signal.SIGSTOP)
    second = start(*SLOW, model, "-o", out)
    _, said = second.communicate()
    os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 1
    assert "another run is writing" in said
    finish(first)


def _interrupted(model: Path, out: Path, how: signal.Signals = signal.SIGKILL) -> tuple[int, str]:
    """(status, complaints) of a run that was disturbed in the middle; a faster one is made again."""
    for _ in range(10):
        process = start(*SLOW, model, "-o", out)
        wait_until_finished(process, out, 5)
        os.kill(process.pid, how)
        _, said = process.communicate()
        if process.returncode:
            assert finished_items(out) >= 5
            return process.returncode, said
        shutil.rmtree(out)
    raise AssertionError("no run could be disturbed in the middle")
