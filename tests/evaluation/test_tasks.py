"""The tasks: rows from the published formats, prompts, and grades of texts; no model and no network."""

import json
from pathlib import Path
from typing import Any

import pytest

from svdconvert.errors import DataError
from svdconvert.evaluation.base import TASKS, Task, tasks_named
from svdconvert.evaluation.tasks import humaneval, mbpp

PUBLIC: dict[str, tuple[dict[str, Any], str]] = {
    "boolq": ({"question": "is ice cold", "answer": True, "passage": "..."}, "true"),
    "piqa": ({"goal": "Boil water", "sol1": "heat it", "sol2": "cool it", "label": 0}, "solution1"),
    "siqa": (
        {
            "context": "A fell.",
            "question": "Why?",
            "answerA": "x",
            "answerB": "y",
            "answerC": "z",
            "label": "3",
        },
        "answer3",
    ),
    "hellaswag": (
        {"activity_label": "Cooking", "ctx": "A man. he", "endings": ["a", "b", "c", "d"], "label": "1"},
        "ending2",
    ),
    "winogrande": ({"sentence": "_ won.", "option1": "Ann", "option2": "Bob", "answer": "2"}, "option2"),
    "arc-easy": (
        {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        "answer2",
    ),
    "arc-challenge": (
        {
            "question": "Why?",
            "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]},
            "answerKey": "A",
        },
        "answer1",
    ),
    "openbookqa": (
        {"question_stem": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
        "answer2",
    ),
}


def task(name: str) -> Task:
    return TASKS.get(name)


def test_every_task_says_what_it_is_and_its_data_is_pinned() -> None:
    loaded, failed = TASKS.load_all()
    assert failed == []
    for name, one in loaded.items():
        assert one.name == name and one.summary, name
        if Path(one.data.name).is_file():  # rows of the package
            continue
        assert one.paper and len(str(one.data.revision)) == 40, name
        assert (one.kind == "classify") == (not one.limits)


def test_the_groups_are_those_of_the_papers() -> None:
    assert {one.name for one in tasks_named(["commonsense"])} == PUBLIC.keys()
    glue = {"mrpc", "rte", "sst2", "cola", "qnli", "qqp", "mnli", "mnli-mismatched", "stsb"}
    assert {one.name for one in tasks_named(["glue"])} == glue


@pytest.mark.parametrize("name", PUBLIC)
def test_public_rows_become_the_published_instructions(name: str) -> None:
    record, gold = PUBLIC[name]
    (row,) = task(name).rows([record])
    assert row.gold == gold
    # The template is an indented string: blanks behind the first line and before every heading.
    assert row.prompt.startswith(
        "Below is an instruction that describes a task. Write a response that appropriately"
    )
    assert (
        "completes the request. \n\n                ### Instruction:\n                Please " in row.prompt
    )
    assert row.prompt.endswith("\n\n                ### Response:\n                ")
    assert "Answer format: " in row.prompt
    instruction = (
        row.prompt.split("### Instruction:\n")[1].split("\n\n                ### Response")[0].strip()
    )
    ready = {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {gold}",
        "answer": gold,
    }
    (again,) = task(name).rows([ready])
    assert (again.prompt, again.gold) == (row.prompt, row.gold)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("record", [{}, {"instruction": "x", "answer": "maybe"}, {"question": 3}])
def test_a_row_that_is_none_is_named(name: str, record: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="row 2: "):
        task(name).rows([PUBLIC[name][0], record])


@pytest.mark.parametrize(
    ("answer", "strict", "paper"),
    [
        ("the correct answer is true", True, True),
        ("The correct answer is True.", True, None),
        ("true", True, True),
        ("untrue", None, True),
        ("It is false, not true", None, False),
        ("the correct answer is false. true", False, False),
        ("It might be true, but the correct answer is false", False, True),
        ("yes", None, None),
        ("", None, None),
    ],
)
def test_choices_are_read_strictly_and_as_published(
    answer: str, strict: bool | None, paper: bool | None
) -> None:
    (row,) = task("boolq").rows([PUBLIC["boolq"][0]])
    for protocol, expected in (("strict", strict), ("paper", paper)):
        grade = task("boolq").grade(row, answer, protocol, None)  # type: ignore[arg-type]
        assert (grade.correct, grade.answered) == (expected is True, expected is not None)


def test_math_rows_have_the_prompt_of_the_papers() -> None:
    records = [
        {
            "problem": "What is $1+1$?",
            "solution": "It is $\\boxed{2}$.",
            "level": "Level 1",
            "type": "Algebra",
        },
        {"instruction": "What is $1+1$?", "output": "It is $\\boxed{2}$."},
    ]
    first, second = task("math").rows(records)
    assert first.prompt == second.prompt
    assert first.prompt == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nWhat is $1+1$?\n\n### Response: Let's think step by step."
    )
    assert first.gold == "2" and first.extra == {"level": "Level 1", "type": "Algebra"}
    for protocol in ("strict", "paper", "paper-pissa"):
        assert task("math").grade(first, "The answer is: 2", protocol, None).correct  # type: ignore[arg-type]
        assert not task("math").grade(first, "2", protocol, None).answered  # type: ignore[arg-type]
    with pytest.raises(DataError, match="row 1: .*boxed"):
        task("math").rows([{"problem": "x", "solution": "2"}])


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\ndef area(r):\n    """The area."""\n',
    "entry_point": "area",
    "canonical_solution": "    return math.pi * r * r\n",
    "test": "def check(candidate):\n    assert candidate(1) == math.pi\n",
}


def runs(text: str, seconds: float) -> bool:
    """Runs a program of these tests here: it is known."""
    try:
        exec(text, {})
    except Exception:
        return False
    return True


@pytest.mark.parametrize(
    ("answer", "strict", "paper", "pissa"),
    [
        ("```python\nimport math\ndef area(r):\n    return math.pi * r * r\n```", True, True, True),
        ("```python\ndef area(r):\n    return math.pi * r * r\n```\nDone.", True, True, True),
        ("```python\n    return math.pi * r * r\n```", True, False, False),
        ("```python\nreturn math.pi * r * r\n```", True, False, False),
        ("    return math.pi * r * r\n", True, True, True),
        ("    return math.pi * r * r\n\nThis is the area.", True, False, False),
        (
            "Here:\n```\nx = 1\n```\nand\n```python\ndef area(r):\n    return math.pi * r * r\n```",
            True,
            True,
            True,
        ),
        ("```python\ndef area(r):\n    return 3\n```", False, False, False),
        ("I do not know.", False, False, False),
    ],
)
def test_the_code_of_an_answer_is_found(answer: str, strict: bool, paper: bool, pissa: bool) -> None:
    (row,) = task("humaneval").rows([HUMANEVAL])
    for protocol, expected in (("strict", strict), ("paper", paper), ("paper-pissa", pissa)):
        assert task("humaneval").grade(row, answer, protocol, runs).correct == expected, protocol  # type: ignore[arg-type]


def test_the_prompt_of_humaneval_is_sorsas() -> None:
    (row,) = task("humaneval").rows([HUMANEVAL])
    assert row.prompt.startswith(
        "@@ Instruction\nHere is the given code to do completion:\n```python\nimport math\n"
    )
    assert row.prompt.endswith("'''python\n# Your codes here\n'''\n\n@@ Response\n")


def test_pissas_extraction_stops_at_assert_even_in_a_docstring() -> None:
    (row,) = task("humaneval").rows([HUMANEVAL])
    answer = '```python\ndef area(r):\n    """assert that it is right"""\n    return math.pi * r * r\n```'
    assert task("humaneval").grade(row, answer, "strict", runs).correct
    assert not task("humaneval").grade(row, answer, "paper-pissa", runs).correct
    assert humaneval.program(row, "```python\nx\n```", "strict") is not None


def test_mbpp_rows_and_programs() -> None:
    record = {
        "task_id": 11,
        "text": "Add two numbers.",
        "code": "def add(a, b):\r\n    return a + b",
        "test_list": ["assert set(add((1,), (2,))) == {1, 2}", "assert add(1, 2) == 3"],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    (row,) = task("mbpp").rows([record])
    assert row.id == "11" and row.extra["name"] == "add"
    assert "assert add(1, 2) == 3" in row.prompt and row.prompt.endswith("### Response:")
    assert task("mbpp").grade(row, f"```python\n{record['code']}\n```", "strict", runs).correct
    assert task("mbpp").grade(row, f"```python\n{record['code']}\n```", "paper", runs).correct
    assert not task("mbpp").grade(row, "```python\ndef add(a, b): return 3\n```", "strict", runs).correct
    assert mbpp.program(row, "", "strict") is None
    with pytest.raises(DataError, match="row 1"):
        task("mbpp").rows([{**record, "test_list": "assert"}])


GLUE: dict[str, list[dict[str, Any]]] = {
    "mrpc": [
        {"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0},
        {"Quality": "1", "#1 String": "a", "#2 String": "b"},
    ],
    "rte": [{"sentence1": "a", "sentence2": "b", "label": "not_entailment"}],
    "sst2": [{"sentence": "a", "label": 1}, {"sentence": "a", "label": "1"}],
    "cola": [{"sentence": "a", "label": 1}],
    "qnli": [{"question": "a", "sentence": "b", "label": 1}],
    "qqp": [{"question1": "a", "question2": "b", "is_duplicate": "1"}],
    "mnli": [
        {"premise": "a", "hypothesis": "b", "label": 1},
        {"sentence1": "a", "sentence2": "b", "gold_label": "neutral"},
    ],
}


@pytest.mark.parametrize("name", GLUE)
def test_glue_rows_of_the_hub_and_of_the_files_are_the_same(name: str) -> None:
    rows = [task(name).rows([record])[0] for record in GLUE[name]]
    assert {(row.prompt, row.gold, json.dumps(dict(row.extra))) for row in rows}.__len__() == 1
    assert task(name).grade(rows[0], "LABEL_1", "strict", None).correct
    assert task(name).grade(rows[0], "1", "strict", None).correct
    assert task(name).grade(rows[0], str(rows[0].gold), "strict", None).correct
    assert not task(name).grade(rows[0], "LABEL_0", "strict", None).correct
    assert not task(name).grade(rows[0], "banana", "strict", None).answered
    with pytest.raises(DataError, match="row 1"):
        task(name).rows([{**GLUE[name][0], "label": -1, "gold_label": -1, "is_duplicate": -1}])


def test_glue_metrics_are_those_of_scikit_learn_and_scipy() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    labels = [0, 1, 1, 0, 1, 1, 0, 0, 1, 0]
    answers = ["0", "1", "0", "1", "LABEL_1", "equivalent", "0", "0", "banana", "not_equivalent"]
    predicted = [0, 1, 0, 1, 1, 1, 0, 0, 0, 0]  # what is no class counts as the wrong one
    rows = task("mrpc").rows([{"sentence1": "a", "sentence2": "b", "label": label} for label in labels])
    found = task("mrpc").metrics(rows, answers)
    assert found["f1"] == pytest.approx(metrics.f1_score(labels, predicted))
    assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(labels, predicted))
    numbers = [0.0, 2.5, 5.0, 3.0]
    guesses = [0.4, 2.0, 4.1, 3.9]
    pairs = task("stsb").rows([{"sentence1": "a", "sentence2": "b", "label": number} for number in numbers])
    found = task("stsb").metrics(pairs, [str(guess) for guess in guesses])
    assert found["pearson"] == pytest.approx(stats.pearsonr(numbers, guesses)[0])
    assert found["spearman"] == pytest.approx(stats.spearmanr(numbers, guesses)[0])
    assert [
        task("stsb").grade(row, str(guess), "strict", None).correct
        for row, guess in zip(pairs, guesses, strict=True)
    ] == [
        True,
        True,
        False,
        False,
    ]
