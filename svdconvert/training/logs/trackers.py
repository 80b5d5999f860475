"""Send metrics to tensorboard, wandb or trackio, through accelerate."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdconvert.config.train import TrainOptions
from svdconvert.errors import MissingPackageError

if TYPE_CHECKING:
    from accelerate import Accelerator


def require_trackers(options: TrainOptions) -> None:
    """Raise MissingPackageError if a tracker that the options name is not installed."""
    for name in options.trackers:
        spec = find_spec(name)
        # A run of wandb leaves a directory `wandb`; Python finds it as a package, but without an origin.
        if spec is None or spec.origin is None:
            raise MissingPackageError(f'{name} is not installed: pip install "svdconvert[{name}]"')


class Trackers:
    """The trackers of one run; a context manager."""

    def __init__(self, accelerator: "Accelerator", options: TrainOptions, run_name: str) -> None:
        """Start the trackers with the options that shape the result as the run's configuration."""
        self._accelerator = accelerator
        if options.trackers:
            config = {key: value for key, value in options.shaping().items() if value is not None}
            # If the directory did not exist, wandb would write somewhere else.
            Path(options.track_dir).mkdir(parents=True, exist_ok=True)
            arguments = {"wandb": {"name": run_name, "dir": options.track_dir}, "trackio": {"name": run_name}}
            accelerator.init_trackers(run_name, config=config, init_kwargs=arguments)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send the measurements of a step."""
        self._accelerator.log(values, step=step)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *error: object) -> None:
        # Not Accelerator.end_training, which would end the process group too.
        for tracker in self._accelerator.trackers:
            tracker.finish()
