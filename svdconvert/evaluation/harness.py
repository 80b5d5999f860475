"""Tasks of lm-evaluation-harness around our loaded model: `harness:NAME`, or `harness:FILE.yaml`."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from time import monotonic
from typing import Any

from svdconvert.errors import ArtifactError, MissingPackageError, SvdConvertError, UnknownNameError
from svdconvert.evaluation.asking import Answering
from svdconvert.evaluation.scores import Graded
from svdconvert.evaluation.store import TaskFiles
from svdconvert.manifest.evaluations import EvaluatedData, EvaluationResult, GradeCount, read_evaluation
from svdconvert.manifest.intervals import standard_error, wilson_interval
from svdconvert.output.journal import Journal
from svdconvert.version import __version__

PREFIX = "harness:"
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,200}")
_DEFAULT_ROWS = 16
_BOOTSTRAPS = 1000
_SHOTS_SEED = 1234
_YAML = (".yaml", ".yml")


def is_harness(task: str) -> bool:
    """True for the name of a task of lm-evaluation-harness."""
    return task.startswith(PREFIX)


def require_harness(task: str) -> str:
    """The name under which the results of `task` are kept.

    Raises MissingPackageError if lm_eval is not installed, UnknownNameError for what is no name or file.
    """
    given = task.removeprefix(PREFIX)
    if given.endswith(_YAML) and not Path(given).is_file():
        raise UnknownNameError(f"{given}: there is no such file; give a task's name or its .yaml file")
    name = Path(given).stem if given.endswith(_YAML) else given
    if not _NAME.fullmatch(name):
        raise UnknownNameError(f"{task!r} is no name of a task of lm-evaluation-harness; give harness:NAME")
    if find_spec("lm_eval") is None:
        raise MissingPackageError(f'{task} needs lm-evaluation-harness: pip install "svdconvert[eval]"')
    return PREFIX + name


def evaluate_harness(model: Answering, task: str, files: TaskFiles) -> EvaluationResult:
    """The result of one task: the one that is there, or a new one, continued from what a killed run left.

    `task` is as the user gave it. Raises ArtifactError if lm_eval refuses the task or the data cannot be
    read, OutputError if the files are those of another run.
    """
    model.run.ranks.alone("eval with harness:")
    with _quiet(task):
        return _evaluate(model, task.removeprefix(PREFIX), files)


@contextmanager
def _quiet(task: str) -> Iterator[None]:
    """Without the log of lm_eval; its errors, which may be of any library, become one sentence."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except SvdConvertError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ArtifactError(f"{task} cannot be run by lm_eval {version('lm_eval')} ({reason})") from error
    finally:
        logger.setLevel(level)


def _evaluate(model: Answering, given: str, files: TaskFiles) -> EvaluationResult:
    from lm_eval import evaluate

    from svdconvert.evaluation.harness_model import HarnessModel

    found_tasks = _load(given)
    loaded: Mapping[str, Any] = found_tasks["tasks"]
    _refuse_code(files.task, loaded)
    identity = _identity(model, files.task, loaded)
    if (found := files.finished(identity)) is not None:
        files.remove_partials()
        model.run.notify(f"{files.task}: {files.result} is there; `overwrite` asks the model again")
        return found
    start = monotonic()
    journal = Journal(files.partial(0), identity)
    try:
        lm = HarnessModel(model, journal, identity["options"]["batch_size"], files.task)
        report = evaluate(
            lm, found_tasks, limit=model.options.limit, bootstrap_iters=_BOOTSTRAPS, log_samples=True
        )
        tokens = sum(int(record.get("tokens", 0)) for record in journal.finished.values())
    finally:
        journal.close()
    assert report is not None
    metrics, headline = _metrics(report, list(loaded))
    lines, grade = _lines(report["samples"], headline)
    result = EvaluationResult(
        **identity | {"model": model.opened.identity, "data": EvaluatedData(**identity["data"])},
        grades={"strict": grade} if grade else {},
        metrics=metrics,
        headline=headline,
        seconds=round(monotonic() - start, 3),
        tokens=tokens,
    )
    files.write(result, Graded(lines, {}, metrics))
    files.remove_partials()
    return read_evaluation(files.result)


def _load(given: str) -> Mapping[str, Any]:
    """The tasks of a name or file, with the settings that lm_eval's own command gives them."""
    found: Mapping[str, Any] = _manager(with_stock=not given.endswith(_YAML)).load([given])
    for task in found["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SHOTS_SEED)
    return found


@cache
def _manager(*, with_stock: bool) -> Any:
    """lm_eval's list of tasks. Its own are thousands of files, which a task in a file can do without."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_stock)


def _refuse_code(task: str, loaded: Mapping[str, Any]) -> None:
    for name, one in loaded.items():
        if getattr(one, "UNSAFE_CODE", False) or one.get_config("unsafe_code"):
            raise ArtifactError(
                f"{task} runs generated code without a sandbox ({name}); take humaneval or mbpp of svdconvert"
            )


def _identity(model: Answering, name: str, loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that shapes the answers."""
    opened = model.opened
    versions = [str(one.VERSION) for one in loaded.values()]
    return {
        "task": name,
        "version": _whole(versions[0]),
        "data": _data(loaded, model.options.limit).model_dump(mode="json"),
        "model": {key: value for key, value in opened.identity.model_dump().items() if key != "name"},
        "options": {
            "dtype": str(model.dtype).removeprefix("torch."),
            "batch_size": model.options.batch_size or _DEFAULT_ROWS,
            "device": next(model.network.parameters()).device.type,
            "tasks": dict(zip(loaded, versions, strict=True)),
            "shots": {task: one.get_config("num_fewshot") for task, one in loaded.items()},
        },
        "versions": {
            "svdconvert": __version__,
            "lm_eval": version("lm_eval"),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
    }


def _whole(text: str) -> int:
    found = re.match(r"\d{1,9}", text)
    return int(found[0]) if found else 0


def _data(loaded: Mapping[str, Any], limit: int | None) -> EvaluatedData:
    """The rows of all tasks together."""
    total = hashlib.sha256()
    count = 0
    for one in loaded.values():
        for number, row in enumerate(one.eval_docs):
            if limit is not None and number >= limit:
                break
            total.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
            count += 1
    first = next(iter(loaded.values()))
    return EvaluatedData(
        name=str(first.get_config("dataset_path") or first.get_config("task")),
        config=first.get_config("dataset_name"),
        split=first.get_config("test_split") or first.get_config("validation_split"),
        sha256=total.hexdigest(),
        rows=count,
        limit=limit,
    )


def _metrics(report: Mapping[str, Any], tasks: Sequence[str]) -> tuple[dict[str, float], str]:
    """(metrics by name, the one that stands for the task): those of the task or group itself.

    A tag has none of its own; it gets the means over its tasks.
    """
    results: Mapping[str, Mapping[str, Any]] = {**report["results"], **report.get("groups", {})}
    groups = [name for name in results if name not in tasks]
    chosen = [results[groups[0]]] if groups else [results[task] for task in tasks]
    names = [name for name in chosen[0] if _is_metric(chosen, name)]
    if not names:
        raise ArtifactError(f"lm_eval found no metric of {', '.join(tasks)}")
    values = {name: sum(float(one[name]) for one in chosen) / len(chosen) for name in names}
    plain = {_short(name): value for name, value in values.items()}
    return plain, _short(names[0])


def _is_metric(results: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [result.get(name) for result in results]
    are_numbers = all(isinstance(value, int | float) and isfinite(value) for value in values)
    return "," in name and "_stderr" not in name and are_numbers


def _short(name: str) -> str:
    """acc for "acc,none", and exact_match,strict-match as it is."""
    return name.removesuffix(",none")


def _lines(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], headline: str
) -> tuple[list[dict[str, Any]], GradeCount | None]:
    """(a line for every row; their count, if every row is right or wrong by the headline's metric)."""
    metric, _, rule = headline.partition(",")
    lines: list[dict[str, Any]] = []
    for task, rows in samples.items():
        for row in rows:
            if row.get("filter", "none") == (rule or "none"):
                lines.append(_line(task, row, row.get(metric)))
    correct = [line["strict"]["correct"] for line in lines]
    if not lines or any(value is None for value in correct):
        for line in lines:
            del line["strict"]
        return lines, None
    return lines, _count(sum(correct), len(correct))


def _line(task: str, row: Mapping[str, Any], value: object) -> dict[str, Any]:
    correct = bool(value) if value in (0, 1) else None
    answers = row.get("filtered_resps")
    return {
        "id": f"{task}/{row['doc_id']}",
        "prompt": json.dumps(row.get("arguments"), default=str),
        "gold": str(row.get("target")),
        "extra": {},
        "answer": json.dumps(answers, default=str),
        "tokens": 0,
        "end": "end",
        "lengths": {},
        "strict": {"correct": correct, "answered": True, "extracted": None},
    }


def _count(correct: int, count: int) -> GradeCount:
    return GradeCount(
        n=count,
        correct=correct,
        unanswered=0,
        cut=0,
        score=correct / count,
        standard_error=standard_error(correct, count),
        interval=wilson_interval(correct, count),
    )
