"""The tables of a report: what a directory is, in words and numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svdconvert.config.recipe import non_default_options, section_of
from svdconvert.inputs.grids import Grid
from svdconvert.manifest.evaluations import EvaluationResult
from svdconvert.manifest.results import LoraResult, MergeResult
from svdconvert.manifest.schema import Manifest, Origin
from svdconvert.manifest.training import Point
from svdconvert.reports.collect import Subject

_MOST_OPTIONS = 30


def overview(subject: Subject) -> dict[str, str]:
    """One row of the table that compares directories; the same columns for all."""
    manifest = subject.manifest
    training = subject.training
    held_out = training.held_out if training else ()
    return {
        "kind": subject.inspection.kind,
        "method": manifest.method if manifest else "",
        "rank": _rank(subject),
        "steps": f"{training.steps:,}" if training and training.steps else "",
        "rate": f"{rate:g}" if training and isinstance(rate := training.options.get("lr"), float) else "",
        "held-out loss": f"{held_out[-1][1]:.4f}" if held_out else "",
        **{one.task: f"{one.score:.1%}" for one in subject.results},
    }


def described(subject: Subject) -> dict[str, str]:
    """What a directory is, without what does not apply."""
    manifest = subject.manifest
    details = subject.inspection.details
    rows = {
        "layout": str(details.get("layout") or ""),
        "method": manifest.method if manifest else "",
        "rank": _rank(subject),
        "matrices": _count(details.get("matrices") or details.get("modules")),
        "trained parameters": _count(details.get("trained_parameters")),
        "base": _origin(manifest.base if manifest else None) or _named(details.get("base")),
        "residual": _origin(manifest.residual if manifest else None),
        **(_measured(manifest) if manifest else {}),
        **_training(subject),
        "options": _options(manifest) if manifest else "",
        "written by": f"svdconvert {manifest.svdconvert}" if manifest else "",
    }
    return {name: value for name, value in rows.items() if value}


def _rank(subject: Subject) -> str:
    manifest = subject.manifest
    ranks = {matrix.rank for matrix in manifest.matrices.values()} if manifest else set()
    if ranks:
        return str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
    if manifest and isinstance(manifest.result, LoraResult):
        return str(manifest.result.rank)
    if subject.training and subject.training.rank:
        return str(subject.training.rank)
    return str(subject.inspection.details.get("rank") or "")


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and value else ""


def _origin(origin: Origin | None) -> str:
    if origin is None:
        return ""
    return f"{origin.location} at {origin.revision[:12]}" if origin.revision else Path(origin.location).name


def _named(base: Any) -> str:
    """The base that an adapter's configuration names, without a path of the machine."""
    return (Path(base).name if Path(base).is_absolute() else base) if isinstance(base, str) else ""


def _measured(manifest: Manifest) -> dict[str, str]:
    matrices = manifest.matrices.values()
    energies = [matrix.energy for matrix in matrices if matrix.energy is not None]
    result = manifest.result
    update = result.update if isinstance(result, MergeResult) else None
    lora = result if isinstance(result, LoraResult) else None
    cut = lora.truncation if lora else None
    return {
        "energy in the adapter": f"{sum(energies) / len(energies):.1%} (mean)" if energies else "",
        "largest error as stored": f"{max(matrix.error for matrix in matrices):.2e}" if energies else "",
        "update as stored": f"cosine {update.cosine:.4f}, {update.kept:.1%} of it kept" if update else "",
        "left out of the change": f"{cut.error:.2%} of its norm" if cut else "",
        "lost by rounding": f"{lora.rounding:.2e} of the change" if lora and lora.rounding else "",
    }


def _training(subject: Subject) -> dict[str, str]:
    training = subject.training
    if training is None:
        return {}
    return {
        "data": ", ".join(training.data),
        "steps": f"{training.steps:,}" if training.steps else "",
        "loss": _change(training.losses),
        "held-out loss": _change(training.held_out),
    }


def _change(points: Sequence[Point]) -> str:
    return f"{points[0][1]:.4f} to {points[-1][1]:.4f}" if points else ""


def _options(manifest: Manifest) -> str:
    section = section_of(manifest.kind, manifest.command)
    given = non_default_options(section, manifest.options)
    parts = [f"{name.replace('_', '-')} {value}" for name, value in list(given.items())[:_MOST_OPTIONS]]
    return ", ".join(parts)


def by_role(grid: Grid) -> list[dict[str, str]]:
    """The numbers of a heat map: one row for each role."""
    roles: dict[str, list[float]] = {}
    for (_, role), value in grid.items():
        roles.setdefault(role, []).append(value)
    return [
        {
            "role": role,
            "layers": str(len(values)),
            "least": f"{min(values):.4g}",
            "mean": f"{sum(values) / len(values):.4g}",
            "largest": f"{max(values):.4g}",
        }
        for role, values in sorted(roles.items())
    ]


def score_rows(subjects: Sequence[Subject]) -> list[Mapping[str, str]]:
    """All evaluations, by task and then by directory, each followed by the published numbers that fit."""
    found = [(one.task, subject.name, one) for subject in subjects for one in subject.results]
    rows: list[Mapping[str, str]] = []
    for task in dict.fromkeys(name for name, _, _ in found):
        published: dict[tuple[str, str], Mapping[str, str]] = {}
        for _, name, result in (one for one in found if one[0] == task):
            rows += _scores(name, result)
            published |= {(one["directory"], one["score"]): one for one in _published(result)}
        rows += published.values()
    return rows


def _scores(name: str, result: EvaluationResult) -> list[Mapping[str, str]]:
    return [
        {
            "task": result.task,
            "directory": name,
            "grade": grade,
            "score": f"{count.score:.1%}",
            "95 % interval": f"{count.interval[0]:.1%} to {count.interval[1]:.1%}",
            "rows": f"{count.n:,}" + (" (first)" if result.data.limit is not None else ""),
            "unanswered": f"{count.unanswered:,}",
            "cut": f"{count.cut:,}",
        }
        for grade, count in result.grades.items()
    ]


def _published(result: EvaluationResult) -> list[Mapping[str, str]]:
    return [
        {
            "task": result.task,
            "directory": f"{one.model}, {one.method}{f', rank {one.rank}' if one.rank else ''}",
            "grade": "published",
            "score": f"{one.score:.1%}",
            "95 % interval": one.source,
            "rows": "",
            "unanswered": "",
            "cut": "",
        }
        for one in result.published
    ]
