"""svdconvert decompose: a checkpoint becomes a residual base and an adapter."""

from dataclasses import asdict, replace
from pathlib import Path

from svdconvert.adapters.peft_format import CONFIG as ADAPTER_CONFIG
from svdconvert.artifact.manifest import Manifest, Matrix, Origin
from svdconvert.artifact.origin import fingerprint
from svdconvert.artifact.split import SplitOptions, SplitPlan, plan_split, split_work
from svdconvert.artifact.stream import file_checksums, notes, source_checksums, stream
from svdconvert.checkpoint.reader import open_checkpoint
from svdconvert.checkpoint.sidecars import finish_model, read_config
from svdconvert.checkpoint.writer import StagedOutput
from svdconvert.hub.fetch import fetch
from svdconvert.layout import find_layout
from svdconvert.linalg.compute import pick_device, use_threads
from svdconvert.run import Run


def decompose(
    model: str | Path, out: str | Path, options: SplitOptions | None = None, run: Run | None = None
) -> Manifest:
    """Split the target matrices of `model` into a residual base and an initial adapter, in `out`.

    `model` is a directory or org/name[@revision]. Raises SvdConvertError with one sentence.
    """
    options, run = options or SplitOptions(), run or Run()
    home = fetch(str(model))
    source, config = open_checkpoint(home.path), read_config(home.path)
    name, layout = find_layout(options.layout, config.get("model_type"), str(home.path))
    plan = plan_split(source, layout, options)
    base = Origin(location=home.location, revision=home.revision, fingerprint=fingerprint(config, source, {}))
    device, threads = pick_device(run.device), use_threads(run.threads)
    identity = {"verb": "decompose", "options": asdict(options), "base": asdict(base), "threads": threads}
    with StagedOutput(Path(out), plan.files, identity=identity, overwrite=run.overwrite) as staged:
        stream(split_work(plan, device), source, staged, run.track)
        if plan.shards:
            finish_model(home.path, staged.path, plan.shards)
        (staged.path / plan.folder / ADAPTER_CONFIG).write_text(plan.adapter_config().text())
        return _manifest(staged, plan, name, base, threads).write(staged.path)


def _manifest(staged: StagedOutput, plan: SplitPlan, layout: str, base: Origin, threads: int) -> Manifest:
    seen = replace(base, fingerprint=replace(base.fingerprint, tensors=source_checksums(staged)))
    return Manifest(
        kind="decomposed",
        layout=layout,
        method=plan.options.method,
        base=seen,
        options=asdict(plan.options),
        matrices={name: Matrix(**note) for name, note in notes(staged).items()},
        files=file_checksums(staged),
        threads=threads,
    )
