"""What a command prints that wrote a LoRA."""

from pathlib import Path
from typing import TYPE_CHECKING

from svdconvert.cli.facts import lora_facts
from svdconvert.cli.summaries import summary
from svdconvert.layouts.loading import loading_in_peft, vllm_advice
from svdconvert.output.sidecars import read_json_object

if TYPE_CHECKING:
    from svdconvert.manifest.results import RecoveredFactors, TruncatedLora
    from svdconvert.manifest.schema import Manifest


def show_lora(out_dir: object, manifest: "Manifest", done: str = "converted") -> None:
    """Print the result of to-lora, or of another command that has `done` something to make a LoRA."""
    from svdconvert.manifest.results import LoraResult

    result = manifest.result
    assert isinstance(result, LoraResult)
    base = manifest.base.location if manifest.base else _named_base(out_dir)
    cut = result.truncation
    loss = f"{cut.error:.2%} of the change's norm left out" if cut else "exact"
    if result.rounding:
        loss = f"{loss if cut else 'no rank left out'}, rounding error {result.rounding:.2e}"
    form = manifest.options.get("format", "peft")
    scale = f"lora_alpha {result.rank}" if form in ("gguf", "rwkv-peft") else "scale 1"
    summary(
        f"{done} into {out_dir}",
        {
            "LoRA": f"rank {result.rank}{_spread(cut)}, {scale}, {loss}",
            "initial adapter": _recovery(result.recovered),
            "for": base or "the base it was made for",
            "vLLM": vllm_advice(result.rank) if form in ("peft", "vllm") else None,
        },
        _uses(out_dir, manifest, base or "BASE"),
        {**lora_facts(out_dir, manifest, result), "base": base},
    )


def _uses(out_dir: object, manifest: "Manifest", base: str) -> list[str]:
    """How a LoRA is loaded by the program whose format it has, and merged."""
    form = manifest.options.get("format", "peft")
    merge = f"svdconvert merge {out_dir} -o MERGED" + ("" if manifest.base else f" --base {base}")
    if form == "gguf":
        return [f"llama-cli -m BASE.gguf --lora {out_dir}/adapter.gguf"]
    if form == "mlx":
        return [f"mlx_lm.generate --model {base} --adapter-path {out_dir}", merge]
    peft = loading_in_peft(manifest.layout, out_dir) if form in ("peft", "vllm") else ""
    return [*([peft] if peft else []), merge]


def _named_base(out_dir: object) -> str | None:
    """The base that the configuration of a written LoRA names."""
    path = Path(str(out_dir)) / "adapter_config.json"
    named = read_json_object(path).get("base_model_name_or_path") if path.is_file() else None
    return str(named) if named else None


def _spread(cut: "TruncatedLora | None") -> str:
    """The range of the ranks if they differ: the file has the largest, and zeros for the others."""
    ranks = [module.rank for module in cut.modules.values()] if cut else []
    return f" ({min(ranks)} to {max(ranks)} by matrix)" if len(set(ranks)) > 1 else ""


def _recovery(recovered: "RecoveredFactors | None") -> str | None:
    if recovered is None:
        return None
    if recovered.by != "difference":
        return f"recomputed from the base, as {recovered.by}"
    return f"recovered, with an error of {recovered.error:.1e} ({recovered.of_base:.1e} of the base's norm)"
