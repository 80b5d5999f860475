"""Where training starts: what `decompose` wrote, or a plain model that is split in memory."""

from svdconvert.adapters.peft_format import PER_EXPERT
from svdconvert.artifact.manifest import PLAIN, is_ours, read_manifest
from svdconvert.artifact.options import SplitOptions
from svdconvert.artifact.split import plan_split
from svdconvert.artifact.start import Start, start_from_decomposed, start_from_plain, start_whole
from svdconvert.errors import ArtifactError
from svdconvert.hub.fetch import fetch
from svdconvert.hub.locate import locate, open_home
from svdconvert.method import METHODS
from svdconvert.run import Run


def find_start(model: str, split: SplitOptions, base: str | None, run: Run) -> Start:
    """The adapter that `decompose` wrote, or one that `split` starts on a plain `model`.

    `base` says where the base is, for methods that leave it as it is. Raises ArtifactError for what cannot
    be trained.
    """
    start = _found(model, split, base, run)
    if start.config.peft_type == PER_EXPERT:
        raise ArtifactError(
            f"{model} adapts experts one by one, which transformers fuses at run time, beyond the trainer; "
            "decompose with --targets attn, or train it elsewhere"
        )
    return start


def _found(model: str, split: SplitOptions, base: str | None, run: Run) -> Start:
    snapshot = fetch(model)
    if not is_ours(snapshot.path) or read_manifest(snapshot.path).kind in PLAIN:
        home = open_home(model)
        name, layout = home.layout(split.layout)
        if METHODS.get(split.method).split is None:
            return start_whole(split.method, name, home.path, home.origin())
        return start_from_plain(
            plan_split(home.source, name, layout, split), home.source, home.path, home.origin(), run.track
        )
    manifest = read_manifest(snapshot.path)
    if manifest.kind != "decomposed":
        raise ArtifactError(
            f"{snapshot.path} is a {manifest.kind} directory; train wants what decompose wrote, or a model"
        )
    if manifest.rebased:
        home = open_home(model)
        return start_from_decomposed(home.path, manifest, home.path, home.origin(manifest.checksums))
    found = locate(manifest.base, base)
    if found is None:
        place = manifest.base.location if manifest.base else "unknown"
        raise ArtifactError(
            f"the base of {snapshot.path} is not at hand ({place}); say where it is with --base"
        )
    return start_from_decomposed(snapshot.path, manifest, found.path, None)
