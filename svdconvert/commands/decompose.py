"""svdconvert decompose: a checkpoint becomes a residual base and an adapter."""

from dataclasses import asdict
from pathlib import Path

from svdconvert.adapters.peft_files import CONFIG as ADAPTER_CONFIG
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.inputs.model import OpenModel, open_headers, open_model, require_plain_checkpoint
from svdconvert.linalg.threads import pick_device, use_threads
from svdconvert.manifest.schema import Manifest, Matrix, Origin, run_identity
from svdconvert.output.sidecars import complete_checkpoint
from svdconvert.output.staging import StagedOutput, check_apart, check_free, recorded
from svdconvert.pipeline.decompose import SplitPlan, plan_split, split_work
from svdconvert.pipeline.estimate import Estimate, estimate
from svdconvert.pipeline.runner import file_checksums, notes, source_checksums, stream


def decompose(
    model: str | Path, out: str | Path, options: SplitOptions | None = None, run: Run | None = None
) -> Manifest:
    """Split the target matrices of `model` into a residual base and an initial adapter, in `out`.

    `model` is a directory, a .pth file or org/name[@revision]. Raises SvdConvertError with one sentence.
    """
    options, run = options or SplitOptions(), run or Run()
    check_free(Path(out), overwrite=run.overwrite)
    require_plain_checkpoint(str(model), "decompose")
    home = open_model(str(model), stream=run.stream)
    plan = _plan(home, options)
    check_apart(Path(out), home.path)
    device = pick_device(run.device, run.ranks.local)
    threads = use_threads(run.threads or recorded(Path(out), "threads"))
    identity = run_identity("decompose", asdict(options), threads) | {"model": home.identity()}
    with StagedOutput(Path(out), plan.files, identity, run) as staged:
        stream(split_work(plan, device), home.source, staged, run)
        manifest = _manifest(staged, plan, home.origin(source_checksums(staged)), threads)
        if run.ranks.leads:
            if plan.shards:
                complete_checkpoint(home.path, staged.path, plan.shards)
            (staged.path / plan.folder / ADAPTER_CONFIG).write_text(plan.adapter_config().text())
            manifest.write(staged.path)
    return manifest


def plan_decompose(model: str | Path, options: SplitOptions | None = None) -> Estimate:
    """What `decompose` would write and take, from headers alone. Writes nothing."""
    require_plain_checkpoint(str(model), "decompose")
    return estimate(_plan(open_headers(str(model)), options or SplitOptions()))


def _plan(home: OpenModel, options: SplitOptions) -> SplitPlan:
    name, layout = home.layout(options.layout)
    return plan_split(home.source, name, layout, options)


def _manifest(staged: StagedOutput, plan: SplitPlan, base: Origin, threads: int) -> Manifest:
    return Manifest(
        kind="decomposed",
        layout=plan.layout,
        method=plan.options.method,
        base=base,
        rebased=plan.method.residual,
        options=asdict(plan.options),
        matrices={name: Matrix(**note) for name, note in notes(staged, plan.slots).items()},
        files=file_checksums(staged),
        threads=threads,
    )
