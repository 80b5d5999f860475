"""Targets of experiments and evaluations: results, answers, recipes of `run`, its record, values of --set."""

import json
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import yaml

from svdconvert.cli.run_command import _changes
from svdconvert.config.recipe import read_recipe
from svdconvert.errors import OutputError
from svdconvert.evaluation.comparison import compare_evaluations
from svdconvert.evaluation.sandbox.runner import _outcome
from svdconvert.evaluation.store import TaskFiles
from svdconvert.manifest.evaluations import FOLDER, read_evaluation
from svdconvert.publish.card_results import is_full_gsm8k, leaderboard_entry, result_files
from svdconvert.version import __version__
from svdconvert.workflow.plan import plan_experiment
from svdconvert.workflow.record import begin
from tests.evaluated import graded
from tests.fuzz.mutate import change_bytes, change_json, change_lines, change_text
from tests.fuzz.settings import RECIPES
from tests.fuzz.target import Target, content_of

_RIGHT = (True, False, True)


def _result(right: tuple[bool, ...]) -> dict[str, Any]:
    grade = graded(sum(right), 0, len(right))
    return {
        "format": 1,
        "task": "gsm8k",
        "version": 1,
        "data": {
            "name": "openai/gsm8k",
            "config": "main",
            "split": "test",
            "sha256": "0",
            "rows": len(right),
        },
        "model": {"kind": "plain", "fingerprint": "0", "name": "x"},
        "grades": {"strict": grade},
        "metrics": {"accuracy": grade["score"]},
        "headline": "accuracy",
        "seconds": 1.5,
        "tokens": 100,
        "published": [{"score": 0.5, "model": "M", "method": "pissa", "data": "D", "source": "S"}],
    }


def _answers(right: tuple[bool, ...]) -> str:
    lines = [
        {
            "id": str(number),
            "prompt": f"question {number}",
            "gold": "1",
            "extra": {},
            "answer": "1" if one else "2",
            "tokens": 1,
            "end": "eos",
            "lengths": {},
            "strict": {"correct": one, "answered": True},
        }
        for number, one in enumerate(right)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


_FILES = {"gsm8k.json": json.dumps(_result(_RIGHT)), "gsm8k.jsonl": _answers(_RIGHT)}


def _read_evaluation(raw: bytes, directory: Path) -> None:
    """A result, or its answers, against an unchanged one: scores are what the answers give."""
    name, _, content = raw.partition(b"\n")
    for place in ("one", "two"):
        (directory / place / FOLDER).mkdir(parents=True)
        for file, text in _FILES.items():
            (directory / place / FOLDER / file).write_text(text)
    folder = directory / "two" / FOLDER
    (folder / name.decode()).write_bytes(content)
    result = read_evaluation(folder / "gsm8k.json")
    if "strict" in result.grades:
        yaml.safe_load(leaderboard_entry(result, "main"))
    else:
        assert not is_full_gsm8k(result)
    result_files({folder / "gsm8k.json": result})
    (task,) = compare_evaluations([directory / "one", directory / "two"]).tasks
    lines = [json.loads(line) for line in (folder / "gsm8k.jsonl").read_bytes().split(b"\n") if line]
    right = sum(line["strict"]["correct"] for line in lines)
    assert (task.results[1].n, task.results[1].correct) == (len(lines), right)
    assert abs(task.results[1].headline_score - right / len(lines)) < 1e-3
    assert [one.answer for one in TaskFiles(folder, "gsm8k").read_answers()] == [
        str(line["answer"]) for line in lines
    ]


def _read_experiment(raw: bytes, directory: Path) -> None:
    """A recipe of `run`: one plan for each variant and seed, and nothing is written."""
    path = directory / "recipe.yaml"
    path.write_bytes(raw)
    planned = plan_experiment(read_recipe(path), {}, directory / "out")
    known = yaml.safe_load(raw.decode()) or {}
    variants, seeds = len(known.get("variants") or {}), len(known.get("seeds") or [])
    assert len(planned.plans) == max(1, variants) * max(1, seeds)
    json.dumps(planned.identity(), default=str)
    assert [path.name for path in directory.iterdir()] == ["recipe.yaml"]


def _read_record(raw: bytes, directory: Path) -> None:
    """The record of a run that is continued, and of one that is replaced: foreign files stay."""
    out = directory / "out"
    kept = [out / "lora" / "thesis.txt", directory / "thesis.txt"]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    (out / "run.json").write_bytes(raw)
    identity = {"runs": {"lora": {"steps": ["train"]}}}
    try:
        begin(out, identity, overwrite=False)
    finally:
        with suppress(OutputError):
            begin(out, identity, overwrite=True)
        assert all(path.read_text() == "precious" for path in kept)


def _read_set(raw: bytes, directory: Path) -> None:
    """A value of --set, as yaml reads it."""
    text = raw.decode("utf-8", "surrogateescape")
    key, _, value = text.partition("=")
    (section,) = _changes([text], None).items()
    found = section[1] if "." not in key else [*section[1].values()][0]  # noqa: RUF015
    assert repr(found) == repr(yaml.safe_load(value))


def _read_report(raw: bytes, directory: Path) -> None:
    """What a confined program reports: it passes only with the token at the end."""
    assert not _outcome(raw, "token").passed or raw.partition(b"\n")[2] == b"token"


def _change_report(chance: Random, raw: bytes) -> bytes:
    first, _, rest = raw.partition(b"\n")
    return change_json(chance, first) + b"\n" + rest if chance.random() < 0.7 else change_bytes(chance, raw)


_YAML = ["- ", ": ", "{", "}", "[", "]", "&a ", "*a", "!!python/object:os.system ", "~", "2024-99-99"]
_WORDS = ["variants", "seeds", "steps", "train", "decompose", "eval", "report", "model", "rank", "method"]
_EXPERIMENT = b"""model: org/name
steps: [decompose, train, eval]
seeds: [0, 1]
decompose: {rank: 4, method: pissa}
train: {data: rows.jsonl, steps: 2}
eval: {tasks: [gsm8k], limit: 2}
variants:
  lora: {decompose: {method: lora}}
  full: {train: {steps: 1}}
"""
_RECORD = {"format": 1, "svdconvert": __version__, "runs": {"lora": {"steps": ["train"]}}}

TARGETS = {
    "evaluation": Target(
        _read_evaluation,
        content_of(lambda chance, raw: (change_json if raw.count(b"\n") < 2 else change_lines)(chance, raw)),
        share=10,
        seeds=[f"{name}\n{text}".encode() for name, text in _FILES.items()],
    ),
    "experiment": Target(
        _read_experiment,
        change_text([*_YAML, *_WORDS]),
        share=5,
        seeds=[_EXPERIMENT, *(path.read_bytes() for path in RECIPES[:3])],
    ),
    "run-record": Target(_read_record, change_json, share=5, seeds=[json.dumps(_RECORD).encode()]),
    "set": Target(
        _read_set,
        change_text([*_YAML, ".", "=", "-"]),
        share=5,
        seeds=[b"train.steps=2", b"seed=0", b"train.data=[a, b]", b"eval.run-code=true"],
    ),
    "sandbox-report": Target(
        _read_report, _change_report, share=5, seeds=[b'{"layers": ["seccomp"]}\ntoken', b'{"error": "x"}\n']
    ),
}
