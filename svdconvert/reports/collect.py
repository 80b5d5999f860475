"""Reads what a directory's files say of it: for a report, without reading any weights of a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from svdconvert.errors import SvdConvertError
from svdconvert.hub.download import fetch
from svdconvert.inputs.grids import Grid, grids_of
from svdconvert.inputs.inspection import Inspection, describe
from svdconvert.manifest.claims import require_answers
from svdconvert.manifest.compared import require_unchanged_sidecar
from svdconvert.manifest.evaluations import (
    FOLDER,
    EvaluationResult,
    manifest_fingerprint,
    read_evaluations,
    result_name,
)
from svdconvert.manifest.results import MergeResult
from svdconvert.manifest.schema import PLAIN, Manifest, has_manifest, read_manifest, training_of
from svdconvert.manifest.training import METRICS, Measurements, Training, read_series
from svdconvert.publish.files import SourceRepos, without_local_paths
from svdconvert.reports.spectra import Spectra, measure_spectra

_T = TypeVar("_T")
_MOST_CELLS = 20_000  # of a heat map


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A directory, as far as its files describe it."""

    name: str
    """Its name, or more of its path if several directories have the same one."""
    inspection: Inspection
    manifest: Manifest | None = None
    """Without the paths of this machine."""
    training: Training | None = None
    series: Measurements = Measurements()
    grids: Mapping[str, Grid] = field(default_factory=dict)
    spectra: Spectra = Spectra()
    results: Sequence[EvaluationResult] = ()
    missing: Sequence[str] = ()
    """Sentences about what is not known of it."""


def collect(directories: Sequence[str | Path]) -> list[Subject]:
    """All directories, in the order given. Raises SvdConvertError if one is of no known kind.

    Raises ChangedError if an adapter differs from its manifest.
    """
    names = short_names([str(directory) for directory in directories])
    return [_collect(str(given), name) for given, name in zip(directories, names, strict=True)]


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of the paths, as few of them as tell the paths apart."""
    parts = [Path(path).absolute().parts if Path(path).exists() else tuple(path.split("/")) for path in paths]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len({*names}) == len({*parts}):
            return names
    return list(paths)


def _collect(given: str, name: str) -> Subject:
    path = Path(given) if Path(given).exists() else fetch(given, "adapter").path
    inspection = describe(given)
    manifest = read_manifest(path) if has_manifest(path) else None
    faults: list[str] = []

    def read(reader: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return reader()
        except SvdConvertError as error:
            faults.append(str(error))
            return otherwise

    is_adapter = inspection.kind in ("decomposed", "trained", "lora", "adapter")
    results: list[EvaluationResult] = read(lambda: read_evaluations(path), [])
    own = [one for one in results if _belongs(one, manifest)]
    proven = [found for one in own if (found := read(partial(_with_answers, path, one), None))]
    subject = Subject(
        name=name,
        inspection=inspection,
        manifest=manifest and without_local_paths(manifest, SourceRepos(manifest.base, manifest.residual)),
        training=read(lambda: training_of(path, manifest), None),
        series=read(partial(_series, path), Measurements()),
        grids=_shown_grids(manifest),
        spectra=measure_spectra(path) if is_adapter else Spectra(),
        results=proven,
    )
    others = [one.task for one in results if one not in own]
    faults += [f"the result of {task} is of other weights and is left out" for task in others]
    said = [sentence.replace(str(path), name) for sentence in (*faults, *_missing(subject))]
    return replace(subject, missing=list(dict.fromkeys(said)))


def _series(path: Path) -> Measurements:
    """The measurements of a training. Raises ChangedError if they are not those that the manifest lists."""
    found = read_series(path / METRICS)
    require_unchanged_sidecar(path / METRICS)
    return found


def _with_answers(path: Path, result: EvaluationResult) -> EvaluationResult:
    """The result, whose grades follow from its answers. Raises ArtifactError if they do not."""
    require_answers(result, path / FOLDER / f"{result_name(result.task)}.json")
    return result


def _belongs(result: EvaluationResult, manifest: Manifest | None) -> bool:
    return manifest is None or result.model.fingerprint == manifest_fingerprint(manifest)


def _shown_grids(manifest: Manifest | None) -> dict[str, Grid]:
    found = grids_of(manifest) if manifest else {}
    return {title: grid for title, grid in found.items() if len(grid) <= _MOST_CELLS}


def _missing(subject: Subject) -> Iterator[str]:
    """What a reader may look for and does not find."""
    manifest = subject.manifest
    yield from subject.spectra.remarks
    if manifest is None:
        yield "there is no svdconvert.json: its base, its energies and its errors are not known"
        return
    if manifest.files_of("model"):
        yield "its weights were not read: svdconvert verify compares them with svdconvert.json"
    yield from _missing_of_training(subject, manifest)
    if isinstance(manifest.result, MergeResult) and manifest.result.update is None:
        yield "what rounding kept of the update was not measured"
    if manifest.kind in PLAIN:
        yield "it has no factors, and so no singular values"
    if not subject.results:
        yield "it was not evaluated: svdconvert eval does that"


def _missing_of_training(subject: Subject, manifest: Manifest) -> Iterator[str]:
    comes_from_training = manifest.kind in ("trained", "finetuned", "merged", "lora")
    if comes_from_training and subject.training is None:
        yield "nothing is recorded of its training"
    elif subject.training is not None and not subject.series.of("loss"):
        yield "rate and drift by step are in the directory that train wrote"
    if subject.training is not None and not subject.training.samples:
        yield "there are no samples: train writes them with --samples"
