"""Killed at any moment, the same command continues and ends with the same bytes."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from svdconvert.commands.convert import convert
from svdconvert.commands.decompose import decompose
from svdconvert.config.execution import Run
from svdconvert.config.options import ConvertOptions
from svdconvert.config.progress import Progress
from svdconvert.output.ownership import staging_directory
from svdconvert.pipeline.decompose import SplitOptions
from tests import medium, rwkv6
from tests.conftest import Build
from tests.endless import COMMANDS, ENDLESS, WRITING, write
from tests.process import KILLS, finish, finished_items, start, sums, wait_until_finished
from tests.reading import readable, write_sums

pytestmark = [pytest.mark.processes, pytest.mark.slow]

ALIKE = ("convert to hf", "combine checkpoints")
"""Commands that write as another one does, which is always killed."""
SLOW: tuple[object, ...] = ("decompose", "--svd", "exact", "--rank", 8)
"""A command that takes a few seconds."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return medium.build(tmp_path_factory.mktemp("model") / "base", layers=8, hidden=256, wide=704)


@pytest.fixture(scope="module")
def sources(model: Path, checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Command -> what it reads."""
    directory = tmp_path_factory.mktemp("sources")
    run = Run(device="cpu", threads=1)
    decomposed = directory / "decomposed"
    decompose(model, decomposed, SplitOptions(rank=8), run)
    training = directory / "training"
    training.mkdir()
    write_sums(training / "sums.jsonl", rows=24)
    base = readable(checkpoint("llama", dtype=torch.float32), training / "base")
    decompose(base, training / "start", SplitOptions(rank=4), run)
    pth = rwkv6.save(rwkv6.random_model(), directory / "rwkv6.pth")
    several = directory / "several"
    for name, seed in (("base", 0), ("one", 1), ("two", 2)):
        medium.build(several / name, layers=4, hidden=256, wide=704, seed=seed)
    hf = directory / "hf"
    convert(pth, hf, ConvertOptions(layout="hf"), run)
    return {
        "decompose": model,
        "train": training,
        "merge": decomposed,
        "to-lora": decomposed,
        "combine adapters": decomposed,
        "combine checkpoints": several,
        "extract": several,
        "convert to hf": pth,
        "convert to blinkdl": hf,
    }


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=pytest.mark.sweep) if name in ALIKE else name for name in COMMANDS],
)
def test_a_command_that_is_killed_again_and_again_ends_with_the_same_bytes(
    command: str, sources: dict[str, Path], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    undisturbed = tmp_path / "undisturbed"
    out = tmp_path / "out"
    steps: set[int] = set()

    def count(progress: Progress) -> None:
        if progress.phase in WRITING:
            steps.add(progress.done)

    write(command, sources[command], undisturbed, _run(count))
    tensors = sorted(steps - {0})
    assert len(tensors) > KILLS
    # Each kill waits until at least one tensor more is finished than when the last one came.
    for moment in sorted(random.Random(command).sample(range(1, len(tensors)), KILLS)):
        process = start(command, sources[command], out, program=ENDLESS)
        wait_until_finished(process, out, moment)
        os.killpg(process.pid, signal.SIGKILL)
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
        assert finished_items(out) >= moment
        assert not out.exists()
        assert not (staging_directory(out) / "svdconvert.json").exists()
    before = finished_items(out)
    during: list[int] = []
    write(command, sources[command], out, _run(lambda progress: during.append(finished_items(out))))
    assert min(during) >= before, "what was finished before the kill was done again"
    assert sums(out) == sums(undisturbed)
    assert not staging_directory(out).exists()
    record_property("counts", {"Kills": {"command": command, "kills": KILLS, "bytes at the end": "the same"}})


def _run(track: Callable[[Progress], None]) -> Run:
    return Run(device="cpu", threads=1, track=track)


def test_ctrl_c_leaves_a_state_to_continue_from_and_says_so(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, said = _interrupted(model, out, signal.SIGINT)
    assert status == 130, said
    assert f"the same command continues from {out}.partial" in said
    assert not out.exists()
    assert "tensors are done" in finish(start(*SLOW, model, "-o", out))


def test_a_terminated_run_says_from_where_it_can_continue(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, said = _interrupted(model, out, signal.SIGTERM)
    assert status == 143, said
    assert f"continues from {out}.partial" in said


@pytest.mark.parametrize(
    ("change", "named"), [(["--rank", 7], "options.rank was 8 and is 7"), (["--alpha", 3], "options.alpha")]
)
def test_another_option_is_refused_by_name(
    model: Path, tmp_path: Path, change: list[object], named: str
) -> None:
    out = tmp_path / "out"
    _interrupted(model, out)
    command = [word for word in SLOW if word not in ("--rank", 8)] if "--rank" in change else SLOW
    process = start(*command, model, "-o", out, *change)
    _, said = process.communicate()
    assert process.returncode == 1
    assert named in said and "--overwrite" in said
    assert staging_directory(out).exists()


def test_a_changed_source_is_refused_by_name(tmp_path: Path) -> None:
    model = medium.build(tmp_path / "base", layers=8, hidden=256, wide=704)
    out = tmp_path / "out"
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
    (staging_directory(out) / "model.safetensors").unlink()
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
    """Exit status and standard error of a run that got a signal in the middle; a faster run is repeated."""
    for _ in range(10):
        process = start(*SLOW, model, "-o", out)
        wait_until_finished(process, out, 5)
        os.kill(process.pid, how)
        _, said = process.communicate()
        if process.returncode:
            assert finished_items(out) >= 5
            return process.returncode, said
        shutil.rmtree(out)
    raise AssertionError("every run had ended before it received the signal")
