"""What `combine`, and `merge` of several adapters, print."""

from typing import TYPE_CHECKING

from svdconvert.cli.facts import merged_facts
from svdconvert.cli.lora_summaries import show_lora
from svdconvert.cli.summaries import summary
from svdconvert.config.sizes import count_text
from svdconvert.layouts.loading import loading

if TYPE_CHECKING:
    from svdconvert.manifest.schema import Manifest


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
            "tensors": f"{len(manifest.checksums)} in {count_text(len(manifest.files_of('model')), 'file')}",
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
