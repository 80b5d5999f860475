"""Results of an evaluation next to a directory, as `eval` writes them, without a model having answered."""

import json
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from svdconvert.manifest.evaluations import FOLDER, manifest_fingerprint
from svdconvert.manifest.schema import read_manifest


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval, as the roots of (p - x)^2 = z^2 x (1 - x) / n in x."""
    z2 = 1.959963984540054**2
    p = correct / n
    a, b, c = 1 + z2 / n, -(2 * p + z2 / n), p * p
    root = sqrt(max(0.0, b * b - 4 * a * c))
    return max(0.0, (-b - root) / (2 * a)), min(1.0, (-b + root) / (2 * a))


def graded(correct: int, unanswered: int, n: int) -> dict[str, Any]:
    """A grade of a result with these counts."""
    return {
        "n": n,
        "correct": correct,
        "unanswered": unanswered,
        "cut": 0,
        "score": correct / n,
        "standard_error": sqrt(correct / n * (1 - correct / n) / n),
        "interval": list(wilson(correct, n)),
    }


def write_result(
    directory: Path, right: Sequence[bool], task: str = "gsm8k", **changes: Any
) -> tuple[Path, Path]:
    """The files of a result and its answers; `right` says of every answer whether it is correct."""
    n = len(right)
    grade = graded(sum(right), 0, n)
    result = {
        "format": 1,
        "task": task,
        "version": 1,
        "data": {"name": "openai/gsm8k", "config": "main", "split": "test", "sha256": "0", "rows": n},
        "model": {
            "kind": read_manifest(directory).kind,
            "fingerprint": manifest_fingerprint(read_manifest(directory)),
            "name": directory.name,
        },
        "grades": {"strict": grade, "paper": graded(sum(right) - 1, 1, n)},
        "metrics": {"accuracy": grade["score"]},
        "headline": "accuracy",
        "seconds": 1.5,
        "tokens": 100,
        "published": [
            {"score": 0.53, "model": "Llama-2-7B", "method": "pissa", "data": "MetaMath", "source": "arXiv"}
        ],
    }
    folder = directory / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"{task.replace(':', '--')}.json"
    path.write_text(json.dumps(result | changes))
    first = right.index(True)
    lines = [
        {
            "id": str(number),
            "answer": "x",
            "strict": {"correct": one, "answered": True},
            "paper": {"correct": one and number != first, "answered": number != first},
        }
        for number, one in enumerate(right)
    ]
    answers = path.with_suffix(".jsonl")
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, answers
