"""Every parser with inputs that anybody may have written: they are refused in a sentence, or read correctly.

A target reads an input and what follows from it. It may raise SvdConvertError, or give the reading of the
reference library; limits.py has what it must not do. Input number N of a target is always the same, so that
`read_one` repeats a failure. An input that failed is kept in tests/data/fuzz/<target>/.
"""

import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from unittest import mock

import pytest

from svdconvert.errors import SvdConvertError
from tests.fuzz import checkpoints, directories, results, rows, settings, storage
from tests.fuzz.limits import BeyondLimitError, limited
from tests.fuzz.target import Target

TARGETS: dict[str, Target] = {
    **checkpoints.TARGETS,
    **directories.TARGETS,
    **settings.TARGETS,
    **rows.TARGETS,
    **storage.TARGETS,
    **results.TARGETS,
}
KEPT = Path(__file__).resolve().parents[1] / "data" / "fuzz"
INPUTS = int(os.environ.get("SVDCONVERT_FUZZ_INPUTS", "5000"))
"""Changed inputs of all targets together; `make soak` wants more."""
_SHARES = sum(target.share for target in TARGETS.values())

every_target = pytest.mark.parametrize("name", TARGETS)


@cache
def kept(name: str) -> list[bytes]:
    """The seeds of a target and the inputs that failed once."""
    return [*TARGETS[name].seeds, *(path.read_bytes() for path in sorted((KEPT / name).glob("*")))]


def changed(name: str, number: int) -> bytes:
    """Input `number` of a target."""
    chance = Random(f"{name} {number}")  # noqa: S311 (a fixed sequence)
    return TARGETS[name].change(chance, chance.choice(kept(name)))


def read_one(name: str, raw: bytes, directory: Path) -> bool:
    """True if an input is read, False if it is refused; anything else is an error of the test."""
    directory.mkdir()
    try:
        with (
            warnings.catch_warnings(),
            mock.patch.object(tempfile, "tempdir", str(directory)),
            limited(directory),
        ):
            warnings.simplefilter("ignore")
            TARGETS[name].read(raw, directory)
        return True
    except SvdConvertError as error:
        assert str(error), "a refusal without a sentence"
        return False
    finally:
        shutil.rmtree(directory)


def read_all(name: str, inputs: "list[tuple[str, bytes]]", directory: Path) -> Counter[bool]:
    """How many inputs are read and refused. An input that fails is left in `directory`."""
    outcomes: Counter[bool] = Counter()
    for label, raw in inputs:
        try:
            outcomes[read_one(name, raw, directory / "work")] += 1
        except (Exception, BeyondLimitError) as error:
            (directory / "failed").write_bytes(raw)
            raise AssertionError(f"{label} of {name} ({directory / 'failed'}, {len(raw)} bytes)") from error
    return outcomes


@every_target
def test_a_kept_input_is_refused_in_a_sentence_or_read_correctly(name: str, tmp_path: Path) -> None:
    outcomes = read_all(name, [(f"kept input {n}", raw) for n, raw in enumerate(kept(name))], tmp_path)
    assert outcomes[True], "no seed is read, so that nothing is tested"


@pytest.mark.slow
@every_target
def test_a_changed_input_is_refused_in_a_sentence_or_read_correctly(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    count = max(20, round(INPUTS * TARGETS[name].share / _SHARES))
    outcomes = Counter[bool]()
    for number in range(count):
        outcomes += read_all(name, [(f"input {number}", changed(name, number))], tmp_path)
    assert sum(outcomes.values()) == count
    row = {"target": name, "inputs": count, "refused": outcomes[False], "read": outcomes[True]}
    record_property("counts", {"Changed inputs": row})
