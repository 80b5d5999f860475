"""svdconvert train: train an adapter, or with `--method full` every weight of a model."""

from pathlib import Path

from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.config.train import TrainOptions
from svdconvert.linalg.threads import use_threads
from svdconvert.manifest.schema import Manifest, read_manifest
from svdconvert.output.staging import StagedOutput, check_apart, check_free, recorded
from svdconvert.training.logs.trackers import require_trackers
from svdconvert.training.run import Watch, ignore_log, load_training_job, train_and_record
from svdconvert.training.start import open_training_start


def train(  # noqa: PLR0913 (what to start from, how to train, and who watches)
    model: str | Path,
    out: str | Path,
    plan: TrainOptions,
    run: Run | None = None,
    *,
    split: SplitOptions | None = None,
    base: str | None = None,
    watch: Watch = ignore_log,
) -> Manifest:
    """Train the adapter of a DECOMPOSED directory, or one that `split` starts on a plain `model`.

    Writes the trained adapter, the unchanged initial adapter and metrics.jsonl to `out`; for the method
    "full" a plain checkpoint and metrics.jsonl. `base` overrides the location of the base, for methods that
    leave the base unchanged. `watch` is called with every measurement. Raises SvdConvertError with one
    sentence.
    """
    run = run or Run()
    target = Path(out)
    split = split or SplitOptions()
    check_free(target, overwrite=run.overwrite)
    require_trackers(plan)
    threads = use_threads(run.threads or recorded(target, "threads"))
    start = open_training_start(str(model), split, base, run, plan.train_also or ())
    check_apart(target, start.weights, Path(model) if Path(model).exists() else None)
    job = load_training_job(start, plan, run)
    with StagedOutput(target, job.output.files, job.identity(split, threads), run) as staged:
        train_and_record(job, staged, run, watch)
        if run.ranks.leads:
            checksums = job.output.write(staged)
            job.output.manifest(job.options, checksums, threads).write(staged.path)
    return read_manifest(target)
