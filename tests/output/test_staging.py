"""The output directory appears complete or not at all."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from svdconvert.checkpoint.tensors import TensorInfo, dtype_code
from svdconvert.config.execution import Run
from svdconvert.errors import OutputError
from svdconvert.output.ownership import MANIFEST_NAME
from svdconvert.output.plan import PlannedFile, plan_file
from svdconvert.output.staging import StagedOutput
from svdconvert.output.uncached import UncachedWriter

TENSORS = {
    "half": torch.randn(5, 3).bfloat16(),
    "wide": torch.randn(4, 4),
    "empty": torch.zeros(0, 3),
    "turned": torch.randn(6, 2).T,
    "scalar": torch.tensor(2.0),
}


def plan(*names: str, file: str = "model.safetensors") -> PlannedFile:
    chosen = {name: TENSORS[name] for name in names or TENSORS}
    infos = [
        TensorInfo(name, tuple(tensor.shape), dtype_code(tensor.dtype)) for name, tensor in chosen.items()
    ]
    return plan_file(file, infos)


def staged(out: Path, *files: PlannedFile, rank: int = 4, overwrite: bool = False) -> StagedOutput:
    return StagedOutput(out, files or [plan()], {"rank": rank}, Run(overwrite=overwrite))


def write_all(output: StagedOutput, file: str = "model.safetensors", names: list[str] | None = None) -> None:
    for name in names or reversed(TENSORS):
        output.write(file, name, TENSORS[name])
        output.finish(name, {})
    manifest = {"files": {file.path: {} for file in output._files}, "sidecars": {}}
    (output.path / MANIFEST_NAME).write_text(json.dumps(manifest))


def same(found: dict[str, Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "below" / "out"


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def test_the_library_reads_what_is_written_in_any_order(out: Path) -> None:
    with staged(
        out, plan("half", "wide"), plan("empty", "turned", "scalar", file="sub/b.safetensors")
    ) as output:
        write_all(output, "sub/b.safetensors", ["scalar", "turned", "empty"])
        write_all(output, "model.safetensors", ["wide", "half"])
        assert not out.exists()
    assert listing(out.parent) == ["out"]
    assert listing(out) == ["model.safetensors", "sub", MANIFEST_NAME]
    assert same(load_file(out / "model.safetensors") | load_file(out / "sub" / "b.safetensors"))
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert list(file.offset_keys()) == ["wide", "half"]


def test_bytes_are_written_chunk_by_chunk(out: Path) -> None:
    raw = memoryview(bytes(TENSORS["wide"].flatten().view(torch.uint8).tolist()))
    with staged(out, plan("wide")) as output:
        output.write_bytes("model.safetensors", "wide", [raw[:1], raw[1:40], raw[40:]])
    assert torch.equal(load_file(out / "model.safetensors")["wide"], TENSORS["wide"])


def test_an_error_before_anything_is_finished_leaves_nothing(out: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged(out) as output:
        output.write("model.safetensors", "wide", TENSORS["wide"])
        raise ZeroDivisionError
    assert listing(out.parent) == []


def interrupted(out: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(out) as output:
        write_all(output, names=["half"])
        raise KeyboardInterrupt


def test_an_error_later_leaves_the_partial_directory_to_continue_from(out: Path) -> None:
    interrupted(out)
    assert listing(out.parent) == ["out.partial"]
    with staged(out) as output:
        assert output.finished.keys() == {"half"}
        write_all(output, names=["wide", "empty", "turned", "scalar"])
    assert listing(out.parent) == ["out"]
    assert same(load_file(out / "model.safetensors"))


@pytest.mark.processes
def test_a_kill_leaves_only_the_partial_directory(out: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from tests.output.test_staging import TENSORS, staged
with staged(Path({str(out)!r})) as output:
    output.write("model.safetensors", "half", TENSORS["half"] * 0 + 1)
    output.finish("half", {{}})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    assert listing(out.parent) == ["out.partial"]
    with staged(out) as output:
        write_all(output, names=[name for name in TENSORS if name not in output.finished])
    found = load_file(out / "model.safetensors")
    assert torch.equal(found.pop("half"), torch.ones(5, 3).bfloat16())
    assert torch.equal(found["wide"], TENSORS["wide"])


def test_other_options_are_refused_and_what_is_finished_stays(out: Path) -> None:
    interrupted(out)
    with pytest.raises(OutputError, match="rank was 4 and is 8"):
        staged(out, rank=8).__enter__()
    with staged(out) as output:
        assert output.finished.keys() == {"half"}
        write_all(output)


def test_overwrite_starts_again(out: Path) -> None:
    interrupted(out)
    with staged(out, plan("wide"), rank=8, overwrite=True) as output:
        assert not output.finished
        assert listing(output.path) == ["journal.jsonl", "model.safetensors"]
        write_all(output, names=["wide"])
    assert list(load_file(out / "model.safetensors")) == ["wide"]


def test_overwrite_replaces_a_finished_directory_only_at_the_end(out: Path) -> None:
    with staged(out) as output:
        write_all(output)
        manifest = {"files": {"model.safetensors": {}}, "sidecars": {"old": "0"}}
        (output.path / "old").write_text("x")
        (output.path / MANIFEST_NAME).write_text(json.dumps(manifest))
    with staged(out, rank=8, overwrite=True) as output:
        write_all(output)
        assert (out / "old").exists()
    assert listing(out.parent) == ["out"]
    assert listing(out) == ["model.safetensors", MANIFEST_NAME]


@pytest.mark.parametrize(("mark", "overwrite"), [(False, False), (True, False), (False, True)])
def test_a_directory_that_holds_something_is_not_touched(out: Path, mark: bool, overwrite: bool) -> None:
    out.mkdir(parents=True)
    (out / "precious").write_text("x")
    if mark:
        (out / MANIFEST_NAME).write_text("{}")
    before = listing(out)
    with pytest.raises(OutputError, match="did not write" if overwrite else "not empty"):
        staged(out, overwrite=overwrite).__enter__()
    assert (listing(out), listing(out.parent)) == (before, ["out"])


def test_a_file_in_the_way_is_refused(out: Path) -> None:
    out.parent.mkdir()
    out.write_text("x")
    with pytest.raises(OutputError, match="not a directory"):
        staged(out, overwrite=True).__enter__()


def test_an_empty_directory_is_used(out: Path) -> None:
    out.mkdir(parents=True)
    with staged(out) as output:
        write_all(output)
    assert listing(out.parent) == ["out"]


def test_a_second_run_at_the_same_time_is_refused_and_the_first_continues(out: Path) -> None:
    with staged(out) as first:
        write_all(first, names=["half"])
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="another run is writing"):
                staged(out, overwrite=overwrite).__enter__()
        write_all(first)
    assert same(load_file(out / "model.safetensors"))


@pytest.mark.parametrize("path", ["/proc/out", "/dev/null/out"])
def test_a_path_that_cannot_be_written_is_a_sentence(path: str) -> None:
    with pytest.raises(OutputError, match=path):
        staged(Path(path)).__enter__()


def full(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], None]:
    """Make the disk full after so many writes; calling the result frees space again."""
    real, count = UncachedWriter.write, 0

    def write(self: UncachedWriter, descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, descriptor, data, offset)

    monkeypatch.setattr(UncachedWriter, "write", write)
    return lambda: monkeypatch.setattr(UncachedWriter, "write", real)


@pytest.mark.parametrize("after", range(4))
def test_a_full_disk_is_a_sentence_and_the_same_command_continues(
    out: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    free_space = full(monkeypatch, after)
    with (
        pytest.raises(OutputError, match="out.partial.* cannot be written: No space left"),
        staged(out) as output,
    ):
        write_all(output, names=["half", "wide", "turned", "scalar", "empty"])
    assert listing(out.parent) == (["out.partial"] if after > 1 else [])
    free_space()
    with staged(out) as output:
        assert len(output.finished) == max(0, after - 1)
        write_all(output, names=[name for name in TENSORS if name not in output.finished])
    assert same(load_file(out / "model.safetensors"))


def test_a_short_write_is_continued(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = UncachedWriter.write
    monkeypatch.setattr(
        UncachedWriter, "write", lambda self, file, data, at: real(self, file, memoryview(data)[:200], at)
    )
    big = torch.randn(100, 10)
    with StagedOutput(out, [plan_file("f", [TensorInfo("big", (100, 10), "F32")])], {}, Run()) as output:
        output.write("f", "big", big)
    assert torch.equal(load_file(out / "f")["big"], big)


@pytest.mark.processes
def test_a_limit_of_the_system_is_a_sentence_and_leaves_nothing(out: Path) -> None:
    program = f"""
import resource
from pathlib import Path
from svdconvert.errors import OutputError
from tests.output.test_staging import staged
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    staged(Path({str(out)!r})).__enter__()
except OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "out.partial cannot be written: File too large" in done.stdout
    assert listing(out.parent) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a file system without a size is Linux's")
def test_a_directory_that_takes_no_files_is_not_reported_as_full() -> None:
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        staged(Path("/proc/nowhere/out")).__enter__()


def test_too_little_space_is_known_before_the_first_byte(out: Path) -> None:
    huge = plan_file("model.safetensors", [TensorInfo("w", (2**30, 2**30), "F32")])
    with pytest.raises(OutputError, match="needs .* GB and the disk has"):
        staged(out, huge).__enter__()
    assert not out.parent.exists()


def test_a_tensor_that_is_not_as_planned_fails_an_assertion(out: Path) -> None:
    with staged(out) as output, pytest.raises(AssertionError, match="planned"):
        output.write("model.safetensors", "wide", torch.zeros(4, 5))


def test_a_run_that_is_aborted_early_keeps_its_directory_only_if_it_asked_for_that(out: Path) -> None:
    for kept in (False, True):
        with pytest.raises(ZeroDivisionError), staged(out) as output:
            (output.path / "state").write_text("step 3")
            if kept:
                output.keep()
            raise ZeroDivisionError
        assert listing(out.parent) == (["out.partial"] if kept else [])
    with staged(out) as output:
        assert not output.finished
        assert (output.path / "state").read_text() == "step 3"
        write_all(output)
    assert same(load_file(out / "model.safetensors"))


def crash(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """Let a function of the staging module end the run as a kill would, without anything after it."""

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"svdconvert.output.staging.{function}", stop)


def test_a_kill_between_removing_the_journal_and_renaming_is_no_dead_end(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash(monkeypatch, "install")
    with pytest.raises(KeyboardInterrupt), staged(out) as output:
        write_all(output)
    assert listing(out.parent) == ["out.partial"]
    assert listing(out.parent / "out.partial") == ["model.safetensors", MANIFEST_NAME]
    monkeypatch.undo()
    with staged(out) as output:
        write_all(output)
    assert listing(out.parent) == ["out"] and same(load_file(out / "model.safetensors"))


def test_an_output_that_cannot_be_renamed_only_has_to_be_renamed_by_the_next_run(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))

    monkeypatch.setattr("svdconvert.output.ownership.rename_to_free_name", broken)
    with pytest.raises(OutputError, match="out cannot be written: Input/output error"), staged(out) as output:
        write_all(output)
    monkeypatch.undo()
    assert listing(out.parent) == ["out.partial"]
    with staged(out) as output:
        assert output.finished.keys() == TENSORS.keys()
    assert same(load_file(out / "model.safetensors"))


def test_a_failed_sync_of_a_complete_output_says_that_it_is_complete(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(directory: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("svdconvert.output.staging.sync_directory", broken)
    with pytest.raises(OutputError, match="out is complete, but may not outlast"), staged(out) as output:
        write_all(output)
    assert listing(out.parent) == ["out"] and same(load_file(out / "model.safetensors"))
