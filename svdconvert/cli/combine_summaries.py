"""What `combine`, and `merge` of several adapters, print."""

from typing import TYPE_CHECKING

from svdconvert.cli.facts import merged_facts
from svdconvert.cli.lora_summaries import show_lora
from svdconvert.cli.summaries import summary
from svdconvert.config.sizes import size_text
from svdconvert.layouts.loading import loading

if TYPE_CHECKING:
    from svdconvert.manifest.schema import Manifest
    from svdconvert.pipeline.merge_group import GroupPlan


def show_combined(out_dir: object, manifest: "Manifest") -> None:
    """Print the result of combine."""
    from svdconvert.manifest.results import MergeResult

    if not isinstance(manifest.result, MergeResult):
        show_lora(out_dir, manifest, "combined")
        return
    update = manifest.result.update
    summary(
        f"combined into {out_dir}",
        {
            "method": manifest.method,
            "tensors": f"{len(manifest.checksums)} in {len(manifest.files_of('model'))} files",
            "update as stored": (
                f"cosine {update.cosine:.4f} with the intended one, {update.kept:.1%} of it kept"
                if update
                else None
            ),
        },
        [
            command
            for command in (f"svdconvert inspect {out_dir}", loading(manifest.layout, out_dir))
            if command
        ],
        merged_facts(out_dir, manifest),
    )


def show_group_plan(plan: "GroupPlan") -> None:
    """Print what a merge of several adapters would read and write."""
    base = plan.group.base
    assert base is not None
    summary(
        f"merge {len(plan.weights)} adapters would",
        {
            "weights": f"the base {base.snapshot.location}",
            "merge": f"{len(plan.modules)} matrices",
            "read": size_text(sum(info.nbytes for info in base.source.infos.values())),
            "write": f"{size_text(sum(file.nbytes for file in plan.shards))} in {len(plan.shards)} files",
        },
        facts={
            "weights": base.snapshot.location,
            "side": "base",
            "adapters": len(plan.weights),
            "matrices": len(plan.modules),
            "read_bytes": sum(info.nbytes for info in base.source.infos.values()),
            "written_bytes": sum(file.nbytes for file in plan.shards),
            "files": [file.path for file in plan.shards],
        },
    )
