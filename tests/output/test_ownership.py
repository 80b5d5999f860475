"""Nothing that svdconvert did not write is overwritten, emptied or removed, at any time of a run."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from svdconvert import Run, SplitOptions, SvdConvertError, decompose
from svdconvert.config.progress import Progress
from svdconvert.output import ownership, rename
from svdconvert.output.ownership import check_free, foreign_files
from svdconvert.output.rename import rename_to_free_name
from tests.conftest import Build
from tests.program import content, refused, succeeded

RANK = ["--rank", 2]


@pytest.fixture
def run(checkpoint: Build, tmp_path: Path) -> Callable[..., object]:
    """Decompose a tiny model into tmp_path/out, in this process."""

    def start(**options: object) -> object:
        return decompose(checkpoint("llama"), tmp_path / "out", SplitOptions(rank=2), Run(**options))  # type: ignore[arg-type]

    return start


def treasure(directory: Path) -> Path:
    """A directory with a file of the user's."""
    directory.mkdir()
    (directory / "thesis.txt").write_text("precious")
    return directory


@pytest.mark.parametrize("command", ["decompose", "to-lora", "merge"])
def test_a_staging_directory_of_somebody_else_is_left_alone(
    command: str, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    foreign = treasure(tmp_path / "out.partial")
    source = checkpoint("llama") if command == "decompose" else decomposed(checkpoint("llama"))
    options = RANK if command == "decompose" else []
    refused(command, source, "-o", tmp_path / "out", *options, words=[foreign, "was not left by svdconvert"])
    refused(command, source, "-o", tmp_path / "out", *options, "--overwrite", words=[foreign])
    assert content(foreign) == {"thesis.txt": b"precious"}
    assert not (tmp_path / "out").exists()


def test_a_staging_directory_that_is_a_link_is_refused(checkpoint: Build, tmp_path: Path) -> None:
    target = treasure(tmp_path / "elsewhere")
    (tmp_path / "out.partial").symlink_to(target)
    refused("decompose", checkpoint("llama"), "-o", tmp_path / "out", *RANK, words=["out.partial"])
    assert content(target) == {"thesis.txt": b"precious"}


def test_an_output_that_is_a_link_is_refused(checkpoint: Build, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    refused("decompose", checkpoint("llama"), "-o", tmp_path / "out", *RANK, words=["symbolic link"])
    assert list((tmp_path / "real").iterdir()) == []


def test_a_directory_called_replaced_is_left_alone(checkpoint: Build, tmp_path: Path) -> None:
    foreign = treasure(tmp_path / "out.replaced")
    succeeded("decompose", checkpoint("llama"), "-o", tmp_path / "out", *RANK)
    succeeded("decompose", checkpoint("llama"), "-o", tmp_path / "out", *RANK, "--overwrite")
    assert content(foreign) == {"thesis.txt": b"precious"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.replaced"]


@pytest.mark.parametrize("name", ["notes.md", "deep/notes.md", "empty/", "link"])
def test_a_file_of_the_user_in_our_directory_stops_overwrite(
    name: str, checkpoint: Build, tmp_path: Path
) -> None:
    succeeded("decompose", checkpoint("llama"), "-o", tmp_path / "out", *RANK)
    path = tmp_path / "out" / name
    path.parent.mkdir(exist_ok=True)
    if name == "empty/":
        path.mkdir()
    elif name == "link":
        path.symlink_to(tmp_path)
    else:
        path.write_text("mine")
    before = content(tmp_path / "out") if name != "link" else None
    words = ["decompose", checkpoint("llama"), "-o", tmp_path / "out", *RANK, "--overwrite"]
    refused(*words, words=[name.rstrip("/"), "did not write"])
    assert before is None or content(tmp_path / "out") == before
    assert path.is_symlink() or path.exists()


@pytest.mark.parametrize("manifest", ["{}", "", "[]", '{"files": []}', '{"files": {}, "sidecars": 3}'])
def test_a_file_called_svdconvert_json_makes_no_directory_ours(manifest: str, tmp_path: Path) -> None:
    foreign = treasure(tmp_path / "out")
    (foreign / "svdconvert.json").write_text(manifest)
    with pytest.raises(SvdConvertError, match="did not write"):
        check_free(foreign, overwrite=True)


def test_a_directory_that_appears_during_the_run_is_not_replaced(
    run: Callable[..., object], tmp_path: Path
) -> None:
    def appear(progress: Progress) -> None:
        if not (tmp_path / "out").exists():
            treasure(tmp_path / "out")

    with pytest.raises(SvdConvertError, match="exists and is not empty|appeared"):
        run(track=appear)
    assert content(tmp_path / "out") == {"thesis.txt": b"precious"}
    (tmp_path / "out" / "thesis.txt").rename(tmp_path / "thesis.txt")
    run()
    assert (tmp_path / "out" / "svdconvert.json").is_file()


def test_what_appears_in_a_replaced_directory_stays(run: Callable[..., object], tmp_path: Path) -> None:
    run()

    def appear(progress: Progress) -> None:
        (tmp_path / "out" / "late.txt").write_text("precious")

    with pytest.raises(SvdConvertError, match=r"late\.txt"):
        run(track=appear, overwrite=True)
    assert (tmp_path / "out" / "late.txt").read_text() == "precious"


def test_the_manifest_lists_every_file(checkpoint: Build, tmp_path: Path) -> None:
    succeeded("decompose", checkpoint("llama"), "-o", tmp_path / "out", *RANK)
    assert list(foreign_files(tmp_path / "out")) == []
    manifest = json.loads((tmp_path / "out" / "svdconvert.json").read_text())
    listed = {*manifest["files"], *manifest["sidecars"], "svdconvert.json"}
    assert listed == content(tmp_path / "out").keys()


@pytest.mark.parametrize("supported", [True, False])
def test_renaming_never_replaces(supported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not supported:
        monkeypatch.setattr(rename, "_rename_exclusively", lambda source, target: None)
    source = treasure(tmp_path / "source")
    for name, make in {"directory": Path.mkdir, "file": Path.touch}.items():
        make(tmp_path / name)
        with pytest.raises(FileExistsError):
            rename_to_free_name(source, tmp_path / name)
    rename_to_free_name(source, tmp_path / "free")
    assert content(tmp_path / "free") == {"thesis.txt": b"precious"}


def test_an_output_that_cannot_be_replaced_stays(
    run: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    before = content(tmp_path / "out")
    real = rename._rename_exclusively

    def broken(source: bytes, target: bytes) -> int | None:
        return errno.EIO if source.endswith(b".partial") else real(source, target)

    monkeypatch.setattr(rename, "_rename_exclusively", broken)
    with pytest.raises(SvdConvertError, match="Input/output error"):
        run(overwrite=True)
    assert content(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]


def test_what_a_killed_run_moved_aside_is_removed_by_the_next_one_and_nothing_else(
    run: Callable[..., object], tmp_path: Path
) -> None:
    run()
    for name in (".out.replaced-1-0", ".out.replaced-2-0", ".outer.replaced-1-0"):
        shutil.copytree(tmp_path / "out", tmp_path / name)
    (tmp_path / ".out.replaced-2-0" / "thesis.txt").write_text("precious")
    foreign = treasure(tmp_path / ".out.replaced-3-0")
    (tmp_path / ".out.replaced-4-0").symlink_to(tmp_path / ".outer.replaced-1-0")
    kept = [content(tmp_path / name) for name in (".out.replaced-2-0", ".outer.replaced-1-0")]
    run(overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".out.replaced-2-0",
        ".out.replaced-3-0",
        ".out.replaced-4-0",
        ".outer.replaced-1-0",
        "out",
    ]
    assert content(foreign) == {"thesis.txt": b"precious"}
    assert [content(tmp_path / name) for name in (".out.replaced-2-0", ".outer.replaced-1-0")] == kept


def test_a_replaced_output_that_cannot_be_removed_entirely_is_still_known_as_ours(
    run: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    real = Path.unlink

    def broken(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name.startswith(".out.replaced") and path.name == "config.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", broken)
    run(overwrite=True)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.undo()
    run(overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_journal_in_a_model_is_not_copied_over_that_of_the_run(checkpoint: Build, tmp_path: Path) -> None:
    base = shutil.copytree(checkpoint("llama"), tmp_path / "base")
    for name in ("journal.jsonl", "journal-1.jsonl", "sent.jsonl", "notes.jsonl"):
        (base / name).write_text("{}\n")
    succeeded("decompose", base, "-o", tmp_path / "out", *RANK)
    found = {path.name for path in (tmp_path / "out").glob("*.jsonl")}
    assert found == {"notes.jsonl"}
    assert list(foreign_files(tmp_path / "out")) == []


@pytest.mark.parametrize("during", [False, True])
def test_a_file_of_the_user_in_the_staging_directory_is_never_lost(
    during: bool, run: Callable[..., object], tmp_path: Path
) -> None:
    """Before a run it is refused; during one it becomes a part of the output, or the run is refused."""
    thesis = tmp_path / "out.partial" / "thesis.txt"

    def appear(progress: Progress) -> None:
        thesis.write_text("precious")

    if during:
        run(track=appear)
        assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
    else:
        thesis.parent.mkdir()
        thesis.write_text("precious")
        with pytest.raises(SvdConvertError, match="was not left by svdconvert"):
            run()
        assert thesis.read_text() == "precious"


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_what_appears_under_the_name_of_the_output_at_the_last_moment_stays(
    kind: str, run: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real = ownership.rename_to_free_name

    def late(source: Path, target: Path) -> None:
        if source.name == "out.partial":
            if kind == "directory":
                treasure(out)
            elif kind == "file":
                out.write_text("precious")
            else:
                out.symlink_to(tmp_path / "elsewhere")
        real(source, target)

    monkeypatch.setattr(ownership, "rename_to_free_name", late)
    with pytest.raises(SvdConvertError, match="appeared while this run was writing"):
        run()
    assert kind != "directory" or content(out) == {"thesis.txt": b"precious"}
    assert kind != "file" or out.read_text() == "precious"
    assert kind != "link" or out.is_symlink()
    monkeypatch.undo()
    out.rename(tmp_path / "moved")
    run()
    assert (out / "svdconvert.json").is_file()
