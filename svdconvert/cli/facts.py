"""What --json tells of a written directory: docs/json.md lists it. Sizes are bytes, shares fractions of 1."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdconvert.output.measurements import losses

if TYPE_CHECKING:
    from svdconvert.manifest.results import LoraResult
    from svdconvert.manifest.schema import Manifest, Matrix
    from svdconvert.pipeline.estimate import Estimate
    from svdconvert.publish.upload import Published


def directory_facts(out_dir: object, manifest: "Manifest") -> dict[str, Any]:
    """Of every directory that a command wrote."""
    home = Path(str(out_dir))
    sizes = [(home / name).stat().st_size for name in manifest.files if (home / name).is_file()]
    return {
        "directory": str(out_dir),
        "kind": manifest.kind,
        "method": manifest.method or None,
        "layout": manifest.layout,
        "base": manifest.base.location if manifest.base else None,
        "files": len(manifest.files),
        "tensors": sum(map(len, manifest.files.values())),
        "bytes": sum(sizes),
    }


def decomposed_facts(out_dir: object, manifest: "Manifest") -> dict[str, Any]:
    """Of the result of decompose."""
    matrices = list(manifest.matrices.values())
    energies = [matrix.energy for matrix in matrices if matrix.energy is not None]
    exact = sum(matrix.engine == "exact" for matrix in matrices)
    return {
        **directory_facts(out_dir, manifest),
        "matrices": len(matrices),
        "least_rank": min(matrix.rank for matrix in matrices),
        "largest_rank": max(matrix.rank for matrix in matrices),
        "mean_energy": sum(energies) / len(energies) if energies else None,
        "largest_error": max(matrix.error for matrix in matrices),
        "fast_svds": len(matrices) - exact if energies else 0,
        "exact_svds": exact if energies else 0,
        "mean_reductions": _mean_reductions(matrices),
    }


def _mean_reductions(matrices: "Sequence[Matrix]") -> dict[str, float]:
    """By how much a 4-bit residual's errors are below those of plain NF4, by norm."""
    found = {}
    for norm, attribute in {"frobenius": "reduction", "nuclear": "nuclear_reduction"}.items():
        values = [getattr(matrix.quantised, attribute, None) for matrix in matrices]
        known = [value for value in values if value is not None]
        if known:
            found[norm] = sum(known) / len(known)
    return found


def merged_facts(out_dir: object, manifest: "Manifest") -> dict[str, Any]:
    """Of the result of merge, or of combine for checkpoints."""
    from svdconvert.manifest.results import MergeResult

    result = manifest.result
    assert isinstance(result, MergeResult)
    update = result.update
    return {
        **directory_facts(out_dir, manifest),
        "side": result.side,
        "update_cosine": update.cosine if update else None,
        "update_kept": update.kept if update else None,
    }


def lora_facts(out_dir: object, manifest: "Manifest", result: "LoraResult") -> dict[str, Any]:
    """Of a LoRA that to-lora, combine or extract wrote."""
    recovered = asdict(result.recovered) if result.recovered else None
    ranks = [module.rank for module in result.truncation.modules.values()] if result.truncation else []
    return {
        **directory_facts(out_dir, manifest),
        "rank": result.rank,
        "least_rank": min(ranks, default=result.rank),
        "truncation_error": result.truncation.error if result.truncation else 0.0,
        "rounding_error": result.rounding,
        "norm": result.norm,
        "recovered": {name: recovered[name] for name in ("by", "error", "of_base")} if recovered else None,
    }


def extracted_facts(out_dir: object, manifest: "Manifest", result: "LoraResult") -> dict[str, Any]:
    """Of the result of extract."""
    found = result.extracted
    assert found is not None
    ranks = [module.rank for module in found.modules.values()]
    return {
        **lora_facts(out_dir, manifest, result),
        "least_rank": min(ranks, default=0),
        "matrices": len(ranks),
        "relative_error": found.error,
        "largest_error": max((module.error for module in found.modules.values()), default=0.0),
        "kept": list(found.kept),
        "omitted": sorted(found.omitted),
    }


def trained_facts(out_dir: object, manifest: "Manifest") -> dict[str, Any]:
    """Of the result of train."""
    trained, held_out = losses(Path(str(out_dir)) / "metrics.jsonl")
    return {
        **directory_facts(out_dir, manifest),
        "steps": len(trained),
        "lr": manifest.options["lr"],
        "first_loss": trained[0],
        "last_loss": trained[-1],
        "first_held_out_loss": held_out[0] if held_out else None,
        "last_held_out_loss": held_out[-1] if held_out else None,
    }


def published_facts(directory: object, repository: str, done: "Published") -> dict[str, Any]:
    """Of a push."""
    return {
        "directory": str(directory),
        "repository": repository,
        "url": done.url,
        "commit": done.commit,
        "files": done.files,
        "bytes": done.nbytes,
        "unsent": done.unsent,
        "changed": done.changed,
        "lacks_base": done.lacks_base,
    }


def estimate_facts(source: object, plan: "Estimate") -> dict[str, Any]:
    """Of decompose --plan."""
    return {
        "source": str(source),
        "matrices": [asdict(row) for row in plan.rows],
        "trained_parameters": sum(row.parameters for row in plan.rows),
        "read_bytes": plan.read,
        "written_bytes": plan.written,
        "files": plan.files,
        "memory_bytes": plan.memory,
        "seconds": plan.seconds,
        "remarks": list(plan.remarks),
    }
