"""What --plan prints of a training run, of a LoRA and of a push."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from svdconvert.cli.summaries import listing, summary
from svdconvert.config.counts import counted
from svdconvert.config.sizes import size_text

if TYPE_CHECKING:
    from svdconvert.checkpoint.tensors import TensorInfo
    from svdconvert.pipeline.combine_estimate import CombineEstimate
    from svdconvert.pipeline.convert_estimate import ConvertEstimate
    from svdconvert.pipeline.lora_estimate import LoraEstimate
    from svdconvert.pipeline.merge_group import GroupPlan
    from svdconvert.pipeline.merge_plan import MergePlan
    from svdconvert.pipeline.rank_table import RankRow
    from svdconvert.publish.upload import PushEstimate
    from svdconvert.training.estimate import TrainEstimate

_MINUTE = 60
_HOUR = 3600
_TENSORS = 3  # that a merge holds at the same time


def show_train_plan(source: object, plan: "TrainEstimate") -> None:
    """Print what a training run would do."""
    share = plan.trained_parameters / max(plan.parameters, 1)
    held_out = f", {plan.held_out_rows:,} held out" if plan.held_out_rows else ""
    summary(
        f"train {source} would",
        {
            "rows": f"{plan.rows:,}{held_out}; {plan.cut:.1%} cut, {plan.left_out:.1%} left out",
            "longest row": f"{plan.longest_row:,} tokens",
            "steps": f"{plan.steps:,}, {plan.epochs:.2f} epochs, {plan.tokens:,} tokens, at rate {plan.lr:g}",
            "train": f"{plan.trained_parameters:,} parameters, {share:.2%} of the model's",
            "write": f"{size_text(plan.written)} in {counted(plan.files, 'file')}"
            + (f", and up to {size_text(plan.checkpoints)} of checkpoints" if plan.checkpoints else ""),
            "peak memory": f"about {size_text(plan.memory)} on {plan.device}, in {plan.precision}",
            "take": f"about {time_text(plan.seconds)}: {plan.basis}",
        },
        facts=train_plan_facts(source, plan),
    )


def train_plan_facts(source: object, plan: "TrainEstimate") -> dict[str, Any]:
    """The same for --json."""
    return {"source": str(source), **_with_bytes(asdict(plan))}


def time_text(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    return f"{seconds / _MINUTE:.0f} min" if seconds < 2 * _HOUR else f"{seconds / _HOUR:.1f} h"


def show_lora_plan(adapter: object, plan: "LoraEstimate") -> None:
    """Print what to-lora would write, and the error of each rank."""
    show_ranks(plan.ranks)
    summary(
        f"to-lora {adapter} would",
        {
            "LoRA": f"rank {plan.rank}, {plan.modules} modules, relative error {plan.relative_error:.2%}",
            "note": None if plan.changed else "the adapter was not trained: this LoRA would change nothing",
            "write": size_text(plan.written),
            "peak memory": f"about {size_text(plan.memory)}",
            "take": f"about {time_text(plan.seconds)}",
        },
        facts=_with_bytes({"source": str(adapter), **asdict(plan), "ranks": [*map(rank_facts, plan.ranks)]}),
    )


def show_ranks(rows: "Sequence[RankRow]") -> None:
    """Print rank against error; nothing without rows."""
    if rows:
        listing(
            ("rank", "error", "with --rank-budget", "size"),
            [
                (row.rank, f"{row.error:.2%}", f"{row.budget_error:.2%}", size_text(row.nbytes))
                for row in rows
            ],
        )


def rank_facts(row: "RankRow") -> dict[str, Any]:
    """A row of rank against error for --json."""
    return {"rank": row.rank, "error": row.error, "budget_error": row.budget_error, "bytes": row.nbytes}


def show_convert_plan(source: object, plan: "ConvertEstimate") -> None:
    """Print what a conversion would do."""
    summary(
        f"convert {source} would",
        {
            "layout": plan.layout,
            "tensors": f"{plan.tensors:,}, {plan.cast:,} of them to another element type",
            "read": size_text(plan.read),
            "write": f"{size_text(plan.written)} in {counted(len(plan.files), 'file')}",
            "peak memory": f"about {size_text(plan.memory)}",
            "take": f"about {time_text(plan.seconds)}",
        },
        facts={"source": str(source), **_with_bytes(asdict(plan))},
    )


def show_combine_plan(plan: "CombineEstimate") -> None:
    """Print what combine would do."""
    what = "modules" if plan.kind == "adapters" else "tensors"
    summary(
        f"combine {plan.inputs} {plan.kind} would",
        {
            "method": plan.method,
            "merge": f"{plan.matrices} {what}" + (f", into rank {plan.rank}" if plan.rank else ""),
            "read": size_text(plan.read),
            "write": f"{size_text(plan.written)} in {counted(len(plan.files), 'file')}",
            "peak memory": f"about {size_text(plan.memory)}",
            "take": f"about {time_text(plan.seconds)}",
        },
        facts=_with_bytes(asdict(plan)),
    )


def show_push_plan(directory: object, plan: "PushEstimate") -> None:
    """Print what a push would send."""
    listing(("file", "size"), [(name, size_text(size)) for name, size in plan.files.items()])
    summary(
        f"push {directory} to {plan.repository} would",
        {
            "send": f"{size_text(plan.nbytes)} in {counted(len(plan.files), 'file')}, and a card",
            "branch": f"{plan.branch}, by a pull request" if plan.pull_request else plan.branch,
            "visible": "to you alone, if the repository is new" if plan.private else None,
            "message": plan.message,
            "base": plan.base,
            "residual": plan.residual,
            "left here": ", ".join(plan.unsent) or None,
            "note": "the card names no base, because that is local; give --base ORG/NAME"
            if plan.lacks_base
            else None,
        },
        facts={"directory": str(directory), **_with_bytes({**asdict(plan), "files": dict(plan.files)})},
    )


def show_merge_plan(adapter: object, plan: "MergePlan") -> None:
    """Print what a merge would read and write."""
    weights = plan.weights
    infos = [*weights.model.source.infos.values()]
    files = [file.path for file in plan.shards]
    _show_merge(
        f"merge {adapter} would",
        {
            "source": str(adapter),
            "weights": weights.model.snapshot.location,
            "side": weights.side,
            "matrices": len(plan.modules),
            **_sizes(infos, plan.nbytes, files),
        },
    )


def show_group_plan(plan: "GroupPlan") -> None:
    """Print what a merge of several adapters would read and write."""
    base = plan.group.base
    assert base is not None
    written = sum(file.nbytes for file in plan.shards)
    files = [file.path for file in plan.shards]
    _show_merge(
        f"merge {len(plan.weights)} adapters would",
        {
            "weights": base.snapshot.location,
            "side": "base",
            "adapters": len(plan.weights),
            "matrices": len(plan.modules),
            **_sizes([*base.source.infos.values()], written, files),
        },
    )


def _show_merge(title: str, facts: dict[str, Any]) -> None:
    summary(
        title,
        {
            "weights": f"the {facts['side']} {facts['weights']}",
            "merge": f"{facts['matrices']} matrices",
            "read": size_text(facts["read_bytes"]),
            "write": f"{size_text(facts['written_bytes'])} in {counted(len(facts['files']), 'file')}",
            "peak memory": f"about {size_text(facts['memory_bytes'])}",
            "take": f"about {time_text(facts['seconds'])}",
        },
        facts=facts,
    )


def _sizes(infos: "Sequence[TensorInfo]", written: int, files: list[str]) -> dict[str, Any]:
    from svdconvert.pipeline.estimate import copy_seconds, memory_of_tensors

    read = sum(info.nbytes for info in infos)
    return {
        "read_bytes": read,
        "written_bytes": written,
        "files": files,
        "memory_bytes": memory_of_tensors(infos, _TENSORS),
        "seconds": copy_seconds(read + written),
    }


def _with_bytes(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts with names that say that a size is in bytes."""
    sizes = {"read": "read_bytes", "written": "written_bytes", "memory": "memory_bytes", "nbytes": "bytes"}
    sizes |= {"checkpoints": "checkpoint_bytes"}
    return {sizes.get(name, name): value for name, value in facts.items()}
