"""What the commands print that compare two checkpoints or adapters."""

from typing import TYPE_CHECKING

from svdconvert.cli.summaries import listing, summary
from svdconvert.config.sizes import size_text
from svdconvert.layouts.loading import is_transformers, vllm_advice

if TYPE_CHECKING:
    from svdconvert.manifest.schema import Manifest
    from svdconvert.pipeline.extract_estimate import ExtractEstimate


def show_extract_plan(base: object, tuned: object, plan: "ExtractEstimate") -> None:
    """Print the estimate of an extraction."""
    listing(
        ("role", "shape", "matrices"),
        [(row.role, " x ".join(map(str, row.shape)), row.count) for row in plan.rows],
    )
    if plan.ranks:
        listing(
            ("rank", "error", "with --rank-budget", "size"),
            [
                (row.rank, f"{row.error:.4f}", f"{row.budget_error:.4f}", size_text(row.nbytes))
                for row in plan.ranks
            ],
        )
    energies = {
        f"--energy {share:g}": f"ranks up to {most}, {total} in all" for share, most, total in plan.tolerances
    }
    summary(
        f"extract {base} {tuned} would",
        {
            "read": size_text(plan.read),
            "known to be equal": f"{plan.equal} tensors, not read" if plan.equal else None,
            "write": size_text(plan.written) if plan.written else None,
            "peak memory": f"about {size_text(plan.memory)}",
            "changed": f"{plan.changed} target matrices" if plan.changed is not None else None,
            **energies,
        },
    )


def show_extracted(out_dir: object, manifest: "Manifest") -> None:
    """Print the result of extract."""
    from svdconvert.manifest.results import LoraResult

    result = manifest.result
    assert isinstance(result, LoraResult) and result.extracted is not None and manifest.base is not None
    found = result.extracted
    ranks = sorted(module.rank for module in found.modules.values())
    spread = f" ({ranks[0]} to {ranks[-1]} by matrix)" if ranks[0] != ranks[-1] else ""
    errors = [module.error for module in found.modules.values()]
    summary(
        f"extracted into {out_dir}",
        {
            "LoRA": f"rank {result.rank}{spread}, scale 1, {len(ranks)} matrices",
            "relative error": f"{found.error:.2e} in all, {max(errors):.2e} at most of a matrix",
            "kept in full": f"{len(found.kept)} tensors" if found.kept else None,
            "left out": f"{len(found.omitted)} tensors that changed" if found.omitted else None,
            "for": manifest.base.location,
            "vLLM": vllm_advice(result.rank),
        },
        [
            *([f'PeftModel.from_pretrained(base, "{out_dir}")'] if is_transformers(manifest.layout) else []),
            f"svdconvert merge {out_dir} -o MERGED",
        ],
    )
