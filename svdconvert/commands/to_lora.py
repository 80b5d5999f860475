"""svdconvert to-lora: what training changed, as a plain LoRA for the untouched base."""

from dataclasses import asdict
from pathlib import Path

from svdconvert.adapters import rwkv_peft
from svdconvert.adapters.peft_files import CONFIG, PER_EXPERT
from svdconvert.config.execution import Run
from svdconvert.config.options import LoraOptions
from svdconvert.errors import ArtifactError
from svdconvert.hub.download import fetch
from svdconvert.inputs.adapter_delta import NO_START, AdapterDelta, open_adapter_delta
from svdconvert.inputs.recover_init import recover_init
from svdconvert.linalg.threads import use_threads
from svdconvert.manifest.schema import Manifest, head_of, run_identity
from svdconvert.output.staging import StagedOutput, check_apart, recorded
from svdconvert.pipeline.runner import file_checksums
from svdconvert.pipeline.to_lora import lora_config, plan_lora, write_lora


def to_lora(  # noqa: PLR0913 (three places that override the manifest's)
    adapter: str | Path,
    out: str | Path,
    options: LoraOptions | None = None,
    run: Run | None = None,
    *,
    base: str | None = None,
    residual: str | None = None,
    init: str | None = None,
) -> Manifest:
    """Write what training changed as a standard PEFT LoRA for the untouched base in `out`.

    The change s B A - s0 B0 A0 is a product of rank 2R, written as it is unless the options truncate it;
    what that loses is in the manifest, by module and over all. Only the two small adapters are read; where
    the initial one is lost, it is recovered from `base` and `residual`, and the manifest says how exactly.
    Raises SvdConvertError with one sentence.
    """
    options, run = options or LoraOptions(), run or Run()
    run.ranks.alone("to-lora")
    start = str(fetch(residual, "adapter").path) if residual else None
    change = open_adapter_delta(
        fetch(str(adapter), "adapter").path, residual=start, init=init, alpha=options.alpha
    )
    _refuse_unknown_start(change, init)
    change = recover_init(change, base, residual)
    check_apart(Path(out), *change.places())
    if change.after.config.peft_type == PER_EXPERT:
        raise ArtifactError(
            f"{change.directory} adapts experts one by one, and no LoRA that stock PEFT loads can say that "
            "(transformers fuses experts at run time); use merge, or decompose with --targets attn"
        )
    plan = plan_lora(change, options)
    threads = use_threads(run.threads or recorded(Path(out), "threads"))
    identity = run_identity("to-lora", asdict(options), threads) | {"adapter": change.identity()}
    with StagedOutput(Path(out), [plan.file], identity, run) as staged:
        write_lora(plan, staged, run.track)
        if options.format == "peft":
            (staged.path / CONFIG).write_text(lora_config(plan, _hub_base(change)).text())
        manifest = change.manifest
        notes = {"truncation": plan.truncation.note()} if plan.truncation else {}
        notes |= {"recovered": change.recovered.note()} if change.recovered else {}
        return Manifest(
            kind="lora",
            layout=manifest.layout if manifest else _layout_of_file(change),
            method=manifest.method if manifest else "lora",
            base=manifest.base if manifest else None,
            options=asdict(options) | {"rank": plan.rank} | notes | head_of(manifest),
            files=file_checksums(staged),
        ).write(staged.path)


def _refuse_unknown_start(change: AdapterDelta, init: str | None) -> None:
    """Refuse an adapter that may be a residual's, for all that it says: its conversion would be wrong."""
    named = change.after.config.base
    on_a_plain_base = named is not None and Path(named).is_dir()
    if change.is_lost:
        return  # and is looked for
    if change.directory.is_file():
        return  # what a file does not say was asked for when it was opened
    if change.manifest is None and change.before is None and init != NO_START and not on_a_plain_base:
        raise ArtifactError(
            f"{change.directory} does not say where it started; name what decompose wrote with "
            f"--residual, its initial adapter with --init, or --init {NO_START} for one that started at zero"
        )


def _layout_of_file(change: AdapterDelta) -> str:
    """The layout of an adapter that has no manifest, where it can be told."""
    return rwkv_peft.LAYOUT if rwkv_peft.is_adapter_file(change.directory) else ""


def _hub_base(change: AdapterDelta) -> str | None:
    base = change.manifest.base if change.manifest else None
    return base.location if base and base.revision else None
