"""What the commands print that compare two checkpoints or adapters."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from svdconvert.cli.answers import tell
from svdconvert.cli.facts import extracted_facts
from svdconvert.cli.plan_summaries import rank_facts, show_ranks
from svdconvert.cli.summaries import listing, summary
from svdconvert.cli.terminal import say
from svdconvert.config.counts import counted
from svdconvert.config.sizes import size_text
from svdconvert.layouts.loading import loading_in_peft, vllm_advice

_MANY = 40  # rows of a table that a screen shows

if TYPE_CHECKING:
    from svdconvert.manifest.schema import Manifest
    from svdconvert.pipeline.diff import ModelDiff
    from svdconvert.pipeline.diff_adapters import AdapterDiff
    from svdconvert.pipeline.extract_estimate import ExtractEstimate
    from svdconvert.pipeline.merge_audit import MergeAudit, Rule


def show_extract_plan(base: object, tuned: object, plan: "ExtractEstimate") -> None:
    """Print the estimate of an extraction."""
    listing(
        ("role", "shape", "matrices"),
        [(row.role, " x ".join(map(str, row.shape)), row.count) for row in plan.rows],
    )
    show_ranks(plan.ranks)
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
        facts=_extract_plan_facts(base, tuned, plan),
    )


def _extract_plan_facts(base: object, tuned: object, plan: "ExtractEstimate") -> dict[str, Any]:
    return {
        "base": str(base),
        "tuned": str(tuned),
        "matrices": [asdict(row) for row in plan.rows],
        "read_bytes": plan.read,
        "written_bytes": plan.written,
        "memory_bytes": plan.memory,
        "equal_tensors": plan.equal,
        "changed_matrices": plan.changed,
        "ranks": [rank_facts(row) for row in plan.ranks],
        "energies": [
            {"energy": share, "largest_rank": most, "total_rank": total}
            for share, most, total in plan.tolerances
        ],
    }


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
            line
            for line in (
                loading_in_peft(manifest.layout, out_dir),
                f"svdconvert merge {out_dir} -o MERGED",
            )
            if line
        ],
        extracted_facts(out_dir, manifest, result),
    )


def diff_json(found: "ModelDiff | AdapterDiff") -> dict[str, Any]:
    """Everything that was measured, for --json; a comparison of models also has its sums by role."""
    from svdconvert.pipeline.diff import ModelDiff

    content = asdict(found)
    if isinstance(found, ModelDiff):
        for row, tensor in zip(content["tensors"], found.tensors, strict=True):
            row["relative"] = tensor.relative
        content["groups"] = [asdict(group) for group in found.groups()]
    return content


def show_diff(found: "ModelDiff | AdapterDiff") -> None:
    """Print how much two checkpoints or adapters differ."""
    from svdconvert.pipeline.diff import ModelDiff

    tell(diff_json(found))
    if isinstance(found, ModelDiff):
        _show_models(found)
    else:
        _show_adapters(found)


def _show_models(found: "ModelDiff") -> None:
    listing(
        (
            "role", "changed", "moved", "relative change", "least cosine", "stable rank", "effective rank",
            "rank for 90 %", "99 %",
        ),
        [
            (
                row.role, f"{row.changed} of {row.tensors}", f"{row.moved:.1%}", _number(row.relative, ".2e"),
                _number(row.cosine, ".6f"), _number(row.stable_rank, ".1f"),
                _number(row.effective_rank, ".1f"), _number(row.rank_90, ".1f"), _number(row.rank_99, ".1f"),
            )
            for row in found.groups()
        ],
    )  # fmt: skip
    changed = sum(one.moved > 0 for one in found.tensors)
    others = len(found.mismatches) - 3
    summary(
        f"{found.second} differs from {found.first}"
        if changed
        else f"{found.first} and {found.second} agree",
        {
            "changed": f"{changed} of {len(found.tensors)} tensors",
            "not read": f"{found.equal_files} tensors of equal files" if found.equal_files else None,
            "not compared": "; ".join(found.mismatches[:3]) + (f"; {others} more" if others > 0 else "")
            or None,
        },
        [f"svdconvert extract {found.first} {found.second} -o LORA --plan --sketch"] if changed else [],
    )


def _show_adapters(found: "AdapterDiff") -> None:
    listing(
        ("module", "|A|", "|B|", "|B - A|", "cosine", "ranks", "left angles", "right angles"),
        [
            (
                one.module,
                *(f"{norm:.3e}" for norm in one.relation.norms),
                f"{one.relation.distance:.3e}",
                _number(one.relation.cosine, ".4f"),
                " and ".join(map(str, one.relation.ranks)),
                _angles(one.relation.left_angles),
                _angles(one.relation.right_angles),
            )
            for one in found.modules[:_MANY]
        ],
    )
    hidden = len(found.modules) - _MANY
    summary(
        f"{found.second} compared with {found.first}",
        {
            "norms": f"{found.norms[0]:.3e} and {found.norms[1]:.3e}",
            "cosine": _number(found.cosine, ".4f"),
            "modules": f"{len(found.modules)}" + (f", {hidden} more with --json" if hidden > 0 else ""),
            "only in the first": _first_names(found.only_first),
            "only in the second": _first_names(found.only_second),
            "not compared": _first_names(found.parameters),
        },
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _angles(degrees: tuple[float, ...]) -> str:
    """The smallest and the largest principal angle."""
    return f"{degrees[0]:.1f} to {degrees[-1]:.1f} degrees" if degrees else ""


def _first_names(names: list[str]) -> str | None:
    more = f", {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more or None


def show_audit(audit: "MergeAudit") -> None:
    """Print how a merged checkpoint relates to the bases and the adapter."""
    if len(audit.bases) > 1:
        listing(
            ("base", "fits", *_RULES, "faults"),
            [
                (
                    one.base,
                    "yes" if one.passed else "no",
                    *(one.rules.get(rule, 0) for rule in _RULES),
                    len(one.faults),
                )
                for one in audit.bases
            ],
        )
    best = audit.best
    for fault in best.faults[:20]:
        say(fault)
    hidden = len(best.faults) - 20
    exact = [matrix.exact for matrix in best.matrices]
    fits = f"{audit.merged} is {best.base} with {audit.adapter} merged into it"
    faults = counted(len(best.faults), "fault")
    wrong = f"{audit.merged} is not {best.base} with {audit.adapter} merged into it: {faults}"
    summary(
        fits if audit.passed else wrong,
        {
            **{f"matrices: {rule}": count for rule, count in best.rules.items()},
            "equal under one rounding": f"{sum(exact) / len(exact):.4f} of the entries" if exact else None,
            "faults": f"{hidden} more are not shown" if hidden > 0 else None,
        },
        facts={
            "passed": audit.passed,
            "merged": audit.merged,
            "adapter": audit.adapter,
            "base": best.base,
            "bases": [{**asdict(one), "passed": one.passed, "rules": dict(one.rules)} for one in audit.bases],
        },
    )


_RULES: tuple["Rule", ...] = ("one rounding", "PEFT's order", "unchanged", "something else")
