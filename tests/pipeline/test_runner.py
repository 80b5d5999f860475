"""The buffers of the runner are reused, but not before their content is written."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from svdconvert.commands.decompose import decompose
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.linalg.threads import worker_pool
from svdconvert.output.staging import StagedOutput
from svdconvert.pipeline import decompose as split
from svdconvert.pipeline import runner
from tests import medium
from tests.process import sums


@pytest.mark.parametrize("threads", [1, 2])
def test_a_slow_disk_does_not_change_the_bytes(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = medium.build(tmp_path / "base", layers=2)
    decompose(model, tmp_path / "quick", SplitOptions(rank=8), Run(threads=threads))
    real = StagedOutput.write

    def slow(self: StagedOutput, *arguments: object) -> None:
        time.sleep(0.02)  # long enough for several matrices to be read and computed
        real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(StagedOutput, "write", slow)
    decompose(model, tmp_path / "slow", SplitOptions(rank=8), Run(threads=threads))
    assert sums(tmp_path / "slow") == sums(tmp_path / "quick")


@pytest.mark.parametrize("threads", [1, 2])
def test_matrices_are_computed_in_full_precision_whatever_the_calling_program_chose(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: set[str] = set()
    real = split.split_tensor

    def watched(*arguments: Any, **named: Any) -> Any:
        found.add(torch.get_float32_matmul_precision())
        return real(*arguments, **named)

    monkeypatch.setattr(split, "split_tensor", watched)
    torch.set_float32_matmul_precision("medium")
    try:
        model = medium.build(tmp_path / "base", layers=1)
        decompose(model, tmp_path / "out", SplitOptions(rank=8), Run(threads=threads))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found == {"highest"}


def test_a_worker_pool_divides_the_threads_and_restores_their_number() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with worker_pool(2) as pool:
            assert {pool.submit(torch.get_num_threads).result() for _ in range(4)} == {2}
        assert torch.get_num_threads() == 4
        with pytest.raises(ZeroDivisionError), worker_pool(2):
            torch.set_num_threads(1)
            raise ZeroDivisionError
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_a_large_file_is_synced_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = medium.build(tmp_path / "base", layers=2)
    synced: list[str] = []
    real = StagedOutput.sync
    monkeypatch.setattr(StagedOutput, "sync", lambda self, file: synced.append(file) or real(self, file))
    counts = []
    for unsynced in (1 << 40, 1 << 12):
        monkeypatch.setattr(runner, "_UNSYNCED", unsynced)
        synced.clear()
        decompose(model, tmp_path / str(unsynced), SplitOptions(rank=8), Run(threads=1))
        counts.append(synced.count("model.safetensors"))
    assert counts[1] > counts[0] + 4, "the file was only synced when it was complete"
