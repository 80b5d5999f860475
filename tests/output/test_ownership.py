"""Nothing that svdconvert did not write is overwritten, emptied or removed, at any time of a run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from svdconvert import Run, SplitOptions, SvdConvertError, decompose
from svdconvert.config.progress import Progress
from svdconvert.output import rename
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
