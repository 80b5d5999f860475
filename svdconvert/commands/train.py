"""svdconvert train: train an adapter, or with `--method full` every weight of a model."""

from pathlib import Path

from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.config.progress import tracked
from svdconvert.config.train import TrainOptions
from svdconvert.hub.download import fetch
from svdconvert.linalg.threads import use_threads
from svdconvert.manifest.schema import Manifest
from svdconvert.output.ownership import check_free
from svdconvert.output.staging import recorded
from svdconvert.pipeline.job import run_job
from svdconvert.training.estimate import TrainEstimate
from svdconvert.training.logs.trackers import require_trackers
from svdconvert.training.model.load import refuse_encoder_decoder
from svdconvert.training.outline import outline_run
from svdconvert.training.plan import plan_run
from svdconvert.training.run import Watch, ignore_log, load_training_job
from svdconvert.training.start import open_training_start


@tracked
def train(  # noqa: PLR0913 (what to start from, how to train, and a callback)
    model: str | Path,
    out: str | Path,
    plan: TrainOptions,
    run: Run | None = None,
    *,
    split: SplitOptions | None = None,
    base: str | None = None,
    watch: Watch = ignore_log,
) -> Manifest:
    """Train the adapter of a DECOMPOSED directory, or a new one, made with `split`, of a plain `model`.

    Writes the trained adapter, the unchanged initial adapter and metrics.jsonl to `out`; for the method
    "full" a plain checkpoint and metrics.jsonl. `base` overrides the location of the base, for methods that
    leave the base unchanged. `watch` is called with every measurement. Raises SvdConvertError with one
    sentence.
    """
    run = run or Run()
    split = split or SplitOptions()
    data = [plan.data] if isinstance(plan.data, str) else plan.data or ()
    given = [model, base, *data, plan.eval_data, plan.image_dir]
    check_free(Path(out), overwrite=run.overwrite, given=given)
    require_trackers(plan)
    if plan.task == "text":
        refuse_encoder_decoder(fetch(str(model), "sidecars").path)
    # A plain model is decomposed while it is opened, with results that depend on the number of threads.
    use_threads(run.threads or recorded(Path(out), "threads"))
    start = open_training_start(str(model), split, base, run, plan.train_also or ())
    return run_job(load_training_job(start, plan, split, run, watch), Path(out), run)


@tracked
def plan_train(
    model: str | Path,
    options: TrainOptions,
    run: Run | None = None,
    *,
    split: SplitOptions | None = None,
    base: str | None = None,
) -> TrainEstimate:
    """Estimate steps, tokens, memory and time of `train` from headers and rows. Writes nothing.

    The arguments are those of `train`, and so are the refusals, except for damage that only the weights show.
    """
    run = run or Run()
    if options.task == "text":
        refuse_encoder_decoder(fetch(str(model), "sidecars").path)
    use_threads(run.threads)
    outline = outline_run(str(model), split or SplitOptions(), base, run)
    return plan_run(outline, options, run)
