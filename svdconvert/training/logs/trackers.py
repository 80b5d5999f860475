"""Metrics to where people watch them: tensorboard, wandb, trackio, through accelerate."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdconvert.config.train import TrainOptions
from svdconvert.errors import MissingPackageError

if TYPE_CHECKING:
    from accelerate import Accelerator


def require_trackers(plan: TrainOptions) -> None:
    """Raise MissingPackageError where a tracker of the plan is not installed."""
    for name in plan.trackers:
        spec = find_spec(name)
        # A folder of that name is found too, with no file behind it: wandb leaves one where it ran.
        if spec is None or spec.origin is None:
            raise MissingPackageError(f'{name} is not installed: pip install "svdconvert[{name}]"')


class Trackers:
    """The trackers of one run; a context manager."""

    def __init__(self, accelerator: "Accelerator", plan: TrainOptions, name: str) -> None:
        """Start them, with the plan's options; a run has the name of its output."""
        self._accelerator = accelerator
        if plan.trackers:
            options = {key: value for key, value in plan.shaping().items() if value is not None}
            Path(plan.track_dir).mkdir(parents=True, exist_ok=True)  # or wandb would choose a place itself
            own = {"wandb": {"name": name, "dir": plan.track_dir}, "trackio": {"name": name}}
            accelerator.init_trackers(name, config=options, init_kwargs=own)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send what was measured."""
        self._accelerator.log(values, step=step)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *error: object) -> None:
        # Not Accelerator.end_training, which ends the process group too.
        for tracker in self._accelerator.trackers:
            tracker.finish()
