"""A .pth file that is laid out first and filled later is one that torch would have written."""

import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.checkpoint.tensors import TensorInfo, dtype_code
from svdconvert.config.execution import Run
from svdconvert.output.plan import plan_model
from svdconvert.output.staging import StagedOutput

TENSORS = OrderedDict(
    [
        ("b", torch.arange(6.0).reshape(2, 3)),
        ("a", torch.randn(5, 7).bfloat16()),
        ("none", torch.ones(0, 3)),
        ("one", torch.tensor(2.5)),
        ("whole", torch.arange(9)),
    ]
)
INFOS = [TensorInfo(name, tuple(tensor.shape), dtype_code(tensor.dtype)) for name, tensor in TENSORS.items()]


def staged(out: Path) -> StagedOutput:
    return StagedOutput(out, plan_model(INFOS, 10**9, "model.pth"), {"verb": "test"}, Run())


def fill(output: StagedOutput, names: list[str]) -> None:
    for name in names:
        output.write("model.pth", name, TENSORS[name])
        output.finish(name, {})


def check(path: Path) -> None:
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert list(loaded) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    # zipfile compares every checksum.
    assert zipfile.ZipFile(path).testzip() is None
    assert list(open_checkpoint(path).infos.values()) == INFOS


def test_torch_and_zip_read_what_was_written_in_any_order(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as output:
        fill(output, sorted(TENSORS))
    check(tmp_path / "out" / "model.pth")


def test_the_entries_lie_where_torch_puts_them(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as output:
        fill(output, list(TENSORS))
    torch.save(TENSORS, tmp_path / "model.pth")
    ours, theirs = (zipfile.ZipFile(path / "model.pth") for path in (tmp_path / "out", tmp_path))
    data = [(entry.filename, entry.CRC) for entry in theirs.infolist() if "/data/" in entry.filename]
    assert len(data) == len(TENSORS)
    assert [(entry.filename, entry.CRC) for entry in ours.infolist() if "/data/" in entry.filename] == data


def test_a_run_that_goes_on_seals_what_the_first_one_wrote(tmp_path: Path) -> None:
    names = list(TENSORS)
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out") as output:
        fill(output, names[:2])
        raise KeyboardInterrupt
    with staged(tmp_path / "out") as output:
        assert set(output.finished) == set(names[:2])
        fill(output, names[2:])
    check(tmp_path / "out" / "model.pth")


def test_a_file_that_was_truncated_is_laid_out_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out") as output:
        fill(output, ["a"])
        raise KeyboardInterrupt
    half = tmp_path / "out.partial" / "model.pth"
    half.write_bytes(half.read_bytes()[:-100])
    with staged(tmp_path / "out") as output:
        assert output.finished == {}
        fill(output, list(TENSORS))
    check(tmp_path / "out" / "model.pth")


@pytest.mark.processes
def test_a_full_disk_while_it_is_laid_out_is_a_sentence(tmp_path: Path) -> None:
    program = f"""
import resource
from pathlib import Path
from svdconvert.errors import OutputError
from tests.output.test_pth_archive import staged
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
try:
    staged(Path({str(tmp_path / "out")!r})).__enter__()
except OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "model.pth cannot be written: PyTorch could not write all of it" in done.stdout
    assert list(tmp_path.iterdir()) == []
