"""What is published of evaluations: a table, entries of the front matter, and the Hub's own file."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from svdconvert.hub.auth import hub_api
from svdconvert.hub.errors import with_retries
from svdconvert.manifest.claims import require_answers
from svdconvert.manifest.evaluations import (
    FOLDER,
    EvaluationResult,
    manifest_fingerprint,
    read_evaluation,
    result_paths,
)
from svdconvert.manifest.schema import Manifest
from svdconvert.publish.card_text import cell

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

HUB_RESULTS = ".eval_results/gsm8k.yaml"
"""The file of which the Hub makes an entry of GSM8K's leaderboard."""
_GSM8K = "gsm8k"
_GSM8K_ROWS = 1319
_GSM8K_DATA = "openai/gsm8k"
_METRICS = {"accuracy": "accuracy", "pass@1": "pass@1", "f1": "f1", "matthews": "matthews_correlation"}
"""Our name of a metric -> the Hub's."""


def own_results(directory: Path, manifest: Manifest) -> dict[Path, EvaluationResult]:
    """The results of this directory's weights, by their file; those of other weights are left out.

    Raises ArtifactError if a file is damaged, or if its grades do not follow from the answers next to it.
    """
    fingerprint = manifest_fingerprint(manifest)
    found = {path: read_evaluation(path) for path in result_paths(directory)}
    own = {path: one for path, one in found.items() if one.model.fingerprint == fingerprint}
    for path, result in own.items():
        require_answers(result, path)
    return own


def result_files(results: Mapping[Path, EvaluationResult]) -> dict[str, Path | bytes]:
    """What is published of a directory's own results: path in the repository -> a file, or its content."""
    files: dict[str, Path | bytes] = {}
    for path, result in results.items():
        for file in (path, path.with_suffix(".jsonl")):
            if file.is_file():
                files[f"{FOLDER}/{file.name}"] = file
        if is_full_gsm8k(result) and (task := leaderboard_task()):
            files[HUB_RESULTS] = leaderboard_entry(result, task).encode()
    return files


def is_full_gsm8k(result: EvaluationResult) -> bool:
    """True for all rows of GSM8K's test set, graded strictly: what a leaderboard may show."""
    strict = result.grades.get("strict")
    data = result.data
    return (
        result.task == _GSM8K
        and data.name.lower() == _GSM8K_DATA
        and data.split == "test"
        and data.limit is None
        and strict is not None
        and strict.n == data.rows == _GSM8K_ROWS
    )


def leaderboard_task() -> str | None:
    """The id of GSM8K's leaderboard, as its data set says in eval.yaml; None if that cannot be read now."""
    try:
        file = with_retries(lambda: hub_api().hf_hub_download(_GSM8K_DATA, "eval.yaml", repo_type="dataset"))
        tasks = yaml.safe_load(Path(file).read_text(encoding="utf-8"))["tasks"]
        ids = {str(task.get("config", "main")): str(task["id"]) for task in tasks}
    except Exception:  # out of reach, or not what the Hub's documentation describes
        return None
    return ids.get("main")


def leaderboard_entry(result: EvaluationResult, task: str) -> str:
    """The content of HUB_RESULTS, with the score in per cent, as https://huggingface.co/docs/hub/eval-results."""
    dataset = {"id": _GSM8K_DATA, "task_id": task}
    if result.data.revision:
        dataset["revision"] = result.data.revision
    entry = {
        "dataset": dataset,
        "value": _percent(result.grades["strict"].score),
        "notes": f"zero-shot, greedy, graded strictly by svdconvert eval, task version {result.version}",
    }
    text: str = yaml.safe_dump([entry], sort_keys=False)
    return text


def model_index(results: Iterable[EvaluationResult], task_type: str) -> "list[EvalResult]":
    """The results for `model-index` in the front matter, in per cent but for F1 and correlations."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=task_type,
            dataset_type=result.data.name,
            dataset_name=result.task,
            dataset_config=result.data.config,
            dataset_split=result.data.split,
            dataset_revision=result.data.revision,
            metric_type=_METRICS.get(name, name),
            metric_value=_percent(value) if name in ("accuracy", "pass@1") else round(value, 4),
            metric_name=f"{name}, {_extent(result)}",
        )
        for result in results
        for name, value in result.metrics.items()
    ]


def result_rows(results: Iterable[EvaluationResult]) -> list[dict[str, str]]:
    """The table of a card: one row for each task and grade."""
    return [
        {
            "task": cell(result.task),
            "grade": grade,
            "rows": f"{count.n:,}{_of_limit(result)}",
            "score": f"{count.score:.1%}",
            "interval": f"{count.interval[0]:.1%} to {count.interval[1]:.1%}",
            "unanswered": f"{count.unanswered:,}",
        }
        for result in results
        for grade, count in result.grades.items()
    ]


def _of_limit(result: EvaluationResult) -> str:
    return " (the first ones)" if result.data.limit is not None else ""


def _extent(result: EvaluationResult) -> str:
    return "strict" if result.data.limit is None else f"strict, the first {result.data.rows} rows"


def _percent(share: float) -> float:
    return round(100 * share, 2)
