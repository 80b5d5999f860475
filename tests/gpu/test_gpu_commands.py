"""Commands on a GPU give what they give on the CPU, but for the last bits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from svdconvert.commands.decompose import decompose
from svdconvert.commands.merge import merge
from svdconvert.commands.verify import verify
from svdconvert.config.execution import Run
from svdconvert.config.options import MergeOptions, SplitOptions
from svdconvert.errors import OutputError
from svdconvert.manifest.schema import read_manifest
from svdconvert.methods.base import METHODS
from svdconvert.output.staging import StagedOutput
from svdconvert.pipeline.transfers import host_buffer, to_device, to_host
from tests import medium
from tests.process import sums

GPU = Run(device="cuda")
CPU = Run(device="cpu")
SPLITTING = [name for name in METHODS.names() if METHODS.get(name).split is not None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return medium.build(tmp_path_factory.mktemp("model") / "base", layers=4, hidden=512, wide=1408)


def tensors(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("method", SPLITTING)
def test_a_decomposition_is_as_good_as_on_the_cpu_and_can_be_verified(
    method: str, model: Path, tmp_path: Path
) -> None:
    options = SplitOptions(method=method, rank=16)
    for name, run in (("gpu", GPU), ("cpu", CPU)):
        decompose(model, tmp_path / name, options, run)
    found, wanted = (read_manifest(tmp_path / name).matrices for name in ("gpu", "cpu"))
    assert found.keys() == wanted.keys()
    for name, matrix in found.items():
        assert matrix.error == pytest.approx(wanted[name].error, rel=0.02, abs=1e-9)
        if matrix.energy is not None:
            assert matrix.energy == pytest.approx(wanted[name].energy, rel=1e-2)
    assert verify(tmp_path / "gpu", base=str(model)).passed


@pytest.mark.parametrize("method", ["pissa", "milora"])
def test_the_same_device_gives_the_same_bytes(method: str, model: Path, tmp_path: Path) -> None:
    for name in ("once", "again"):
        decompose(model, tmp_path / name, SplitOptions(method=method, rank=16), GPU)
    assert sums(tmp_path / "once") == sums(tmp_path / "again")


def test_a_decomposition_is_resumed_to_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SplitOptions(rank=16)
    decompose(model, tmp_path / "whole", options, GPU)
    with monkeypatch.context() as patched:
        written: list[str] = []

        def fail(self: StagedOutput, name: str, record: dict[str, object]) -> None:
            written.append(name)
            if len(written) > 10:
                raise OSError("the disk is full")
            finish(self, name, record)

        finish = StagedOutput.finish
        patched.setattr(StagedOutput, "finish", fail)
        with pytest.raises(OutputError, match="the disk is full"):
            decompose(model, tmp_path / "resumed", options, GPU)
    decompose(model, tmp_path / "resumed", options, GPU)
    assert sums(tmp_path / "resumed") == sums(tmp_path / "whole")


@pytest.mark.parametrize("side", ["base", "residual"])
def test_a_merge_is_the_same_as_on_the_cpu_but_for_single_roundings(
    side: str, model: Path, tmp_path: Path
) -> None:
    decompose(model, tmp_path / "split", SplitOptions(rank=16), CPU)
    for name, run in (("gpu", GPU), ("cpu", CPU)):
        merge(tmp_path / "split", tmp_path / name, MergeOptions(side=side), run, base=str(model))
    found, wanted = tensors(tmp_path / "gpu"), tensors(tmp_path / "cpu")
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor.float(), wanted[name].float(), rtol=2**-7, atol=1e-6), name
        assert (tensor != wanted[name]).float().mean() < 1e-2


def test_tf32_of_the_calling_program_does_not_reach_the_results(model: Path, tmp_path: Path) -> None:
    options = SplitOptions(rank=16, residual_dtype="float32")
    decompose(model, tmp_path / "plain", options, GPU)
    torch.set_float32_matmul_precision("high")
    try:
        decompose(model, tmp_path / "tf32", options, GPU)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert sums(tmp_path / "tf32") == sums(tmp_path / "plain")


def test_memory_on_the_gpu_is_that_of_a_few_matrices(tmp_path: Path) -> None:
    peaks = []
    for layers in (1, 1, 6):  # libraries take memory of their own the first time
        model = medium.build(tmp_path / f"base-{len(peaks)}", layers=layers, hidden=1024, wide=2816)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        decompose(model, tmp_path / f"out-{len(peaks)}", SplitOptions(rank=16), GPU)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    largest = 1024 * 2816 * 4
    assert peaks[2] < peaks[1] + 2 * largest
    assert peaks[2] < 12 * largest


def test_results_come_back_in_the_buffer_that_the_matrix_was_read_into() -> None:
    device = torch.device("cuda")
    buffer = host_buffer(4096, device)
    assert buffer.is_pinned()
    stored = buffer.view(torch.float32)[:1000].view(10, 100)
    stored.copy_(torch.arange(1000.0).view(10, 100))
    matrix = to_device(stored, device)
    found = to_host({"large": matrix.T + 1, "small": matrix[0]}, device, buffer)
    assert torch.equal(found["large"], torch.arange(1, 1001.0).view(10, 100).T)
    assert found["large"].data_ptr() == buffer.data_ptr()
    assert torch.equal(found["small"], torch.arange(100.0))
    larger = to_host({"all": torch.arange(2000.0, device=device)}, device, buffer)
    assert torch.equal(larger["all"], torch.arange(2000.0))
