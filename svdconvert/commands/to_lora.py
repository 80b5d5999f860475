"""svdconvert to-lora: write the change made by training as a plain LoRA for the untouched base."""

from pathlib import Path

from svdconvert.config.execution import Run
from svdconvert.config.options import LoraOptions
from svdconvert.config.progress import tracked
from svdconvert.inputs.dora_delta import approximated_dora
from svdconvert.inputs.open_adapter import open_adapter_delta
from svdconvert.inputs.recover_init import find_base, find_base_sidecars, settle_init
from svdconvert.inputs.sources import Sources
from svdconvert.manifest.schema import Manifest
from svdconvert.output.ownership import check_free
from svdconvert.pipeline.job import run_job
from svdconvert.pipeline.lora_estimate import LoraEstimate, estimate_lora
from svdconvert.pipeline.lora_plan import LoraPlan, plan_lora
from svdconvert.pipeline.to_lora import LoraJob


@tracked
def to_lora(  # noqa: PLR0913 (three locations that override the manifest's)
    adapter: str | Path,
    out: str | Path,
    options: LoraOptions | None = None,
    run: Run | None = None,
    *,
    base: str | None = None,
    residual: str | None = None,
    init: str | None = None,
) -> Manifest:
    """Write the change made by training to `out`, as a standard PEFT LoRA for the untouched base.

    The delta s B A - s0 B0 A0 is a product of rank 2R, which is written exactly unless the options truncate
    it; the manifest then has the truncation errors, by module and in total. Only the two small adapters are
    read. A lost initial adapter is recovered from `base` and `residual`, with its error in the manifest.
    Raises SvdConvertError with one sentence.
    """
    run = run or Run()
    run.ranks.alone("to-lora")
    check_free(Path(out), overwrite=run.overwrite, given=[adapter, base, residual, init])
    sources = Sources(base=base, residual=residual, init=init, trust_remote_code=run.trust_remote_code)
    return run_job(LoraJob(_plan(adapter, options or LoraOptions(), sources)), Path(out), run)


@tracked
def plan_to_lora(
    adapter: str | Path,
    options: LoraOptions | None = None,
    run: Run | None = None,
    *,
    base: str | None = None,
    residual: str | None = None,
    init: str | None = None,
) -> LoraEstimate:
    """Say what `to_lora` would write, and the error that each rank would have. Writes nothing.

    Reads what `to_lora` reads. Raises SvdConvertError with one sentence.
    """
    run = run or Run()
    run.ranks.alone("to-lora")
    sources = Sources(base=base, residual=residual, init=init, trust_remote_code=run.trust_remote_code)
    return estimate_lora(_plan(adapter, options or LoraOptions(), sources))


def _plan(adapter: str | Path, options: LoraOptions, sources: Sources) -> LoraPlan:
    delta = open_adapter_delta(adapter, sources, options.alpha)
    if delta.adapter.config.dora:
        delta = approximated_dora(delta, find_base(delta, sources), options.rank)
    needs_base = options.format == "gguf"
    delta = settle_init(delta, sources, base_used=needs_base)
    model = find_base_sidecars(delta, sources) if needs_base else None
    return plan_lora(delta, options, sources, model)
