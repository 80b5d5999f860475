"""The plan of a training run: its data are read and encoded as for the run, its weights are not."""

from dataclasses import replace

from svdconvert.config.execution import Run
from svdconvert.config.train import TrainOptions
from svdconvert.training.data.dataset import TrainingData, open_training_data
from svdconvert.training.estimate import Machine, TrainEstimate, estimate_training
from svdconvert.training.model.extra_parameters import ParameterShapes, choose_parameters
from svdconvert.training.model.load import head_shapes
from svdconvert.training.optim.accelerator import make_accelerator
from svdconvert.training.outline import Outline
from svdconvert.training.resolve_defaults import (
    check_options_beyond_the_run,
    learning_rate_warning,
    resolve_defaults,
)


def plan_run(outline: Outline, options: TrainOptions, run: Run) -> TrainEstimate:
    """Read the data and estimate the run. Raises SvdConvertError for options that the run would refuse.

    Calls `run.notify` with a sentence for everything that may surprise the user, as the run does.
    """
    options = resolve_defaults(options, outline.method, outline.dropout, run.notify)
    also = choose_parameters(outline.infos, outline.layout, outline.matrices, options.train_also or ())
    data = open_training_data(
        outline.model.sidecars, outline.layout, options, trust_remote_code=run.trust_remote_code
    )
    for warning in (learning_rate_warning(outline.name, options.lr or 0.0), *data.splits.warnings):
        if warning:
            run.notify(warning)
    accelerator = make_accelerator(replace(options, track=None, track_dir="runs"))
    mixed = accelerator.mixed_precision
    machine = Machine(
        device=accelerator.device,
        precision="fp32" if mixed == "no" else mixed,
        processes=accelerator.num_processes,
    )
    check_options_beyond_the_run(
        options, options.total_steps(len(data.splits.train), machine.processes), run.notify
    )
    return estimate_training(outline, options, data, {**also, **_head(outline, data)}, machine)


def _head(outline: Outline, data: TrainingData) -> ParameterShapes:
    """The new parameters of a classifier or regressor."""
    return {} if data.labels is None else head_shapes(outline.model.sidecars, data.labels, outline.infos)
