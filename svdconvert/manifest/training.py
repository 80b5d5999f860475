"""What is known of the training that a directory comes from: data, options, losses, prompt and samples.

`train` records it; `merge` and `to-lora` pass it on to directories that have no measurements of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from svdconvert.output.measurements import read_measurements

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
CHAT = "chat"
"""The prompt format of a model that is asked with the tokenizer's chat template."""
NO_TEMPLATE = "none"
"""The prompt format of a model that is asked with the text alone."""
_MOST_STEPS = 1 << 53
_POINTS = 64
_MOST_SAMPLES = 3
_LONGEST = 2000  # characters of a sample

Point = tuple[Annotated[int, Field(ge=0, lt=_MOST_STEPS)], Annotated[float, Field(allow_inf_nan=False)]]
"""(step, value)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The answers to one held-out prompt, cut at 2000 characters."""

    prompt: str
    before: str
    """Before the first step."""
    after: str
    """After the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """A training run."""

    options: Mapping[str, Any]
    """The options of train, defaults included."""
    steps: Annotated[int, Field(ge=0, lt=_MOST_STEPS)] = 0
    rank: int | None = None
    """The largest rank of the adapter; None for full fine-tuning."""
    prompt: str | None = None
    """How the model is asked: a template with {prompt} in it, chat or none; None for a classifier, and if it
    is not known."""
    losses: Sequence[Point] = ()
    """(last step, mean loss) of at most 64 parts of the run."""
    held_out: Sequence[Point] = ()
    """(step, held-out loss), at most 64 of them, the first and the last among these."""
    samples: Sequence[Sample] = ()

    @property
    def data(self) -> list[str]:
        """The data sets by name: files without their folder, and org/name of the Hub."""
        given = self.options.get("data")
        names = [given] if isinstance(given, str) else given if isinstance(given, (list, tuple)) else []
        return [name if is_hub_data(str(name)) else Path(str(name)).name for name in names]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurements:
    """The measurements of a run that have one value per step, by name: loss, eval_loss, sigma_drift."""

    series: Mapping[str, Sequence[Point]] = field(default_factory=dict)

    def of(self, name: str) -> Sequence[Point]:
        """The points of one measurement in the order of the steps; empty if it was not made."""
        return self.series.get(name, ())


def is_hub_data(data: str) -> bool:
    """True for org/name[:config], False for a file."""
    parts = data.split(":")[0].split("/")
    return len(parts) == 2 and all(parts) and not Path(data).suffix and not data.startswith((".", "~"))


def read_series(path: Path) -> Measurements:
    """All measurements in a metrics.jsonl; none if the file does not exist.

    Values that are no finite floats are left out. Raises ArtifactError if the file is damaged.
    """
    series: dict[str, list[Point]] = {}
    for _, values in read_measurements(path) if path.is_file() else ():
        step = values.pop("step")
        for name, value in values.items():
            if 0 <= step < _MOST_STEPS and isinstance(value, float) and isfinite(value):
                series.setdefault(name, []).append((step, value))
    return Measurements(series=series)


def recorded_training(
    directory: Path, options: Mapping[str, Any], rank: int | None, prompt: str | None = None
) -> Training:
    """The training whose measurements and samples are in `directory`.

    Raises ArtifactError if these are damaged.
    """
    found = read_series(directory / METRICS)
    losses = found.of("loss")
    return Training(
        options=dict(options),
        steps=losses[-1][0] if losses else 0,
        rank=rank,
        prompt=prompt,
        losses=averaged(losses, _POINTS),
        held_out=thinned(found.of("eval_loss"), _POINTS),
        samples=read_samples(directory / SAMPLES)[:_MOST_SAMPLES],
    )


def averaged(points: Sequence[Point], parts: int) -> list[Point]:
    """At most `parts` points: the last step and the mean value of equal parts of the run."""
    size = -(-len(points) // parts) or 1
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(chunk[-1][0], sum(value for _, value in chunk) / len(chunk)) for chunk in chunks]


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` of the points, evenly spread, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(number * (len(points) - 1) / (most - 1))] for number in range(most)]


def read_samples(path: Path) -> list[Sample]:
    """The first and the last answer to every prompt in a samples.jsonl; none if the file does not exist.

    Raises ArtifactError if the file is damaged.
    """
    first: dict[str, str] = {}
    last: dict[str, str] = {}
    for _, values in read_measurements(path) if path.is_file() else ():
        prompt = values.get("prompt")
        response = values.get("response")
        if isinstance(prompt, str) and isinstance(response, str):
            first.setdefault(prompt, response)
            last[prompt] = response
    return [
        Sample(prompt=prompt[-_LONGEST:], before=first[prompt][:_LONGEST], after=last[prompt][:_LONGEST])
        for prompt in first
    ]
