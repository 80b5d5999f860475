"""svdconvert convert: the same tensors under the names of another layout."""

from dataclasses import asdict
from pathlib import Path

from svdconvert.config.execution import Run
from svdconvert.config.options import ConvertOptions
from svdconvert.inputs.model import OpenModel, open_model, require_plain_checkpoint
from svdconvert.layouts.detect import in_family
from svdconvert.manifest.schema import Manifest, run_identity
from svdconvert.output.sidecars import finish_model, write_config
from svdconvert.output.staging import StagedOutput, check_apart, check_free, recorded
from svdconvert.pipeline.convert import Conversion, convert_work, plan_conversion
from svdconvert.pipeline.runner import file_checksums, stream


def convert(model: str | Path, out: str | Path, options: ConvertOptions, run: Run | None = None) -> Manifest:
    """Write the tensors of `model` in another layout of its family, one tensor at a time, in `out`.

    Nothing but names, shapes and order changes unless `options` names another element type, so the way
    back gives the same bytes. Raises SvdConvertError with one sentence.
    """
    run = run or Run()
    check_free(Path(out), overwrite=run.overwrite)
    require_plain_checkpoint(str(model), "convert")
    home, plan = _prepare(str(model), options, run.stream)
    check_apart(Path(out), home.path)
    threads = recorded(Path(out), "threads") or 0
    identity = run_identity("convert", asdict(options), threads) | {"model": home.identity()}
    with StagedOutput(Path(out), plan.files, identity, run) as staged:
        stream(convert_work(plan, str(home.path)), plan.view, staged, run)
        manifest = Manifest(
            kind="converted",
            layout=plan.name,
            method="",
            base=home.origin(),
            options=asdict(options),
            files=file_checksums(staged),
        )
        if run.ranks.leads:
            if plan.config is not None:
                write_config(staged.path, plan.config)
            finish_model(home.path, staged.path, plan.files, leave=plan.left_out)
            manifest.write(staged.path)
    if plan.advice:
        run.notify(plan.advice)
    return manifest


def _prepare(model: str, options: ConvertOptions, stream: bool) -> tuple[OpenModel, Conversion]:
    home = open_model(model, stream=stream)
    name, layout = home.layout()
    target, wanted = in_family(name, layout, options.layout)
    return home, plan_conversion(home.source, layout, target, wanted, options)
