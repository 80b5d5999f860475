"""Process-wide settings of the program, and how it exits."""

import os
import subprocess
import sys

import pytest

from svdconvert.cli import process


def test_environment_variables_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
    process.configure_libraries()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    assert os.environ.pop("HF_HUB_VERBOSITY") == "error"


def test_a_c_library_without_mallopt_causes_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: object) -> object:
        raise OSError("no C library")

    monkeypatch.setattr(process.ctypes, "CDLL", absent)
    process.configure_malloc_for_streaming()


def printed(program: str) -> str:
    """What a Python program prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.processes
def test_the_program_looks_for_cycles_seldom_and_not_at_its_end() -> None:
    program = (
        "import atexit, gc, sys; sys.argv = ['svdconvert', '--version'];"
        "atexit.register(lambda: print(gc.get_freeze_count() > 0, gc.get_threshold()[0] >= 10_000));"
        "from svdconvert.__main__ import main; main()"
    )
    assert printed(program).endswith("\nTrue True\n")


@pytest.mark.processes
def test_importing_the_library_changes_no_setting_of_the_process() -> None:
    program = (
        "import gc, os; before = (gc.get_threshold(), dict(os.environ));"
        "import svdconvert, svdconvert.commands.decompose;"
        "print(before == (gc.get_threshold(), dict(os.environ)))"
    )
    assert printed(program) == "True\n"


@pytest.mark.processes
def test_a_reader_that_has_closed_the_pipe_causes_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        command = [sys.executable, "-m", "svdconvert", "list", "methods"]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == ""
