"""svdconvert merge: base or residual and adapter become a plain checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from svdconvert.config.execution import Run
from svdconvert.config.options import MergeOptions
from svdconvert.errors import ArtifactError
from svdconvert.hub.download import fetch
from svdconvert.inputs.adapter_delta import AdapterDelta, open_adapter_delta
from svdconvert.inputs.model import OpenModel, find_model, open_model
from svdconvert.inputs.recover_init import recover_init
from svdconvert.linalg.threads import pick_device, use_threads
from svdconvert.manifest.schema import Manifest, has_manifest, head_of, run_identity
from svdconvert.output.sidecars import complete_checkpoint, read_config, write_config
from svdconvert.output.staging import StagedOutput, check_apart, check_free, recorded
from svdconvert.pipeline.merge import MergePlan, Side, merge_work, plan_merge, update_note, write_added
from svdconvert.pipeline.runner import file_checksums, notes, source_checksums, stream

FAITHFUL = 0.95
"""The least cosine between intended and realised update that nothing is said about."""


def merge(  # noqa: PLR0913 (three places that override the manifest's)
    adapter: str | Path,
    out: str | Path,
    options: MergeOptions | None = None,
    run: Run | None = None,
    *,
    base: str | None = None,
    residual: str | None = None,
    init: str | None = None,
) -> Manifest:
    """Fold a trained (or untrained) adapter back into a plain checkpoint, in `out`.

    `adapter` is a TRAINED, DECOMPOSED or LORA directory or any PEFT LoRA, here or on the Hub; `base`,
    `residual` and `init` say where its parts lie, where that is not where the manifest says. Raises
    SvdConvertError with one sentence.
    """
    options, run = options or MergeOptions(), run or Run()
    check_free(Path(out), overwrite=run.overwrite)
    found = prepare_merge(adapter, options, Places(base, residual, init, run.stream))
    change, side, home, plan = found.change, found.plan.side, found.home, found.plan
    check_apart(Path(out), home.path, *change.places())
    device = pick_device(run.device, run.ranks.local)
    threads = use_threads(run.threads or recorded(Path(out), "threads"))
    identity = run_identity("merge", asdict(options), threads) | {
        "from": side,
        "weights": home.identity(),
        "adapter": change.identity(),
    }
    work = merge_work(plan, device, _expected(change, side), str(home.path))
    if plan.added and run.shard_sink is not None:
        raise ArtifactError(f"{change.directory} brings a head of its own: merge it without --stream")
    with StagedOutput(Path(out), plan.shards, identity, run) as staged:
        stream(work, home.source, staged, run)
        if plan.added and run.ranks.leads:
            write_added(plan, staged)
        manifest = _manifest(staged, found, options, threads)
        if run.ranks.leads:
            if remark := _swallowed(manifest):
                run.notify(remark)
            _write_sidecars(found, staged.path)
            manifest.write(staged.path)
    return manifest


def _write_sidecars(found: "Merging", directory: Path) -> None:
    complete_checkpoint(found.home.path, directory, found.plan.shards)
    if head := head_of(found.change.manifest).get("head"):
        write_config(directory, read_config(directory) | head)


@dataclass(frozen=True)
class Merging:
    """A merge before it is done, known from headers alone."""

    layout: str
    change: AdapterDelta
    home: OpenModel
    plan: MergePlan

    @property
    def read(self) -> int:
        """Bytes of the weights that are read."""
        return sum(info.nbytes for info in self.home.source.infos.values())

    @property
    def written(self) -> int:
        """Bytes of tensors that are written."""
        return sum(shard.nbytes for shard in self.plan.shards)


@dataclass(frozen=True)
class Places:
    """Where the parts of a merge lie, if not where the manifest says."""

    base: str | None = None
    residual: str | None = None
    init: str | None = None
    stream: bool = False
    """Leave weights on the Hub where they are."""


def prepare_merge(adapter: str | Path, options: MergeOptions, places: Places) -> Merging:
    """Find the parts of a merge and plan it. Writes nothing."""
    here = fetch(str(adapter), "adapter")
    there = fetch(places.residual, "adapter") if places.residual else here
    named = str(there.path) if places.residual else None
    change = open_adapter_delta(here.path, residual=named, init=places.init, alpha=options.alpha)
    if change.residual == there.path:  # of which only the adapter is fetched so far
        places = replace(places, residual=there.name)
    side, home = _choose(change, options.side, places)
    if side == "base":
        change = recover_init(change, str(home.snapshot.name), places.residual)
    name, layout = home.layout(_known_layout(change))
    return Merging(name, change, home, plan_merge(change, home.source, side, layout, options))


def _manifest(staged: StagedOutput, found: Merging, options: MergeOptions, threads: int) -> Manifest:
    known, side = found.change.manifest, found.plan.side
    seen = found.home.origin(source_checksums(staged))
    remarks = _restored(found.change) | update_note(notes(staged, found.plan.modules))
    return Manifest(
        kind="merged",
        layout=found.layout,
        method=known.method if known else "lora",
        base=seen if side == "base" else known.base if known else None,
        residual=seen if side == "residual" else None,
        options=asdict(options) | {"side": side} | remarks | head_of(known),
        files=file_checksums(staged),
        threads=threads,
    )


def _known_layout(change: AdapterDelta) -> str | None:
    return change.manifest.layout or None if change.manifest else None


def _choose(change: AdapterDelta, side: str, places: Places) -> tuple[Side, OpenModel]:
    """The base where it is given or found, else the residual; `side` other than "auto" insists."""
    known = change.manifest.residual if change.manifest else None
    if change.is_lost and side == "auto" and (change.residual or known):
        side = "residual"  # which needs no start
    if side in ("auto", "base"):
        home = find_model(
            change.manifest.base if change.manifest else None, places.base, stream=places.stream
        )
        if home is not None:
            return "base", home
        if side == "base" or not _has_residual(change):
            recover_init(change, places.base, places.residual)  # which says what a lost start wants
            place = change.manifest.base.location if change.manifest and change.manifest.base else "unknown"
            raise ArtifactError(
                f"the base of {change.directory} is not at hand ({place}); say where it is with --base"
            )
    if not _has_residual(change):
        raise ArtifactError(
            f"{change.directory} has no residual base: its method leaves the base as it is; use --from base"
        )
    return "residual", _residual_home(change, places)


def _has_residual(change: AdapterDelta) -> bool:
    if change.manifest is None:
        return change.residual is not None
    return change.manifest.kind != "lora" and change.manifest.rebased


def _residual_home(change: AdapterDelta, places: Places) -> OpenModel:
    if change.residual is not None:
        return open_model(places.residual or str(change.residual), stream=places.stream)
    assert change.manifest is not None
    home = find_model(change.manifest.residual, places.residual, stream=places.stream)
    if home is None:
        place = change.manifest.residual.location if change.manifest.residual else "none was written"
        raise ArtifactError(
            f"neither the base nor the residual of {change.directory} is at hand ({place}); "
            "say where one is with --base or --residual"
        )
    return home


def _swallowed(manifest: Manifest) -> str | None:
    """A sentence where rounding to nearest left too little of the update in some matrices."""
    if manifest.options["rounding"] != "nearest":
        return None
    rows = manifest.options.get("update", {}).get("matrices", {})
    low = {name: row["cosine"] for name, row in rows.items() if row["cosine"] < FAITHFUL}
    if not low:
        return None
    worst = min(low, key=low.__getitem__)
    return (
        f"rounding swallows updates in {len(low)} of {len(rows)} matrices: the cosine between realised and "
        f"intended change is below {FAITHFUL} ({low[worst]:.2f} in {worst}); --dtype float32 keeps it, "
        "--rounding stochastic does on average"
    )


def _restored(change: AdapterDelta) -> dict[str, Any]:
    """For the manifest: how a lost start was found again."""
    return {"recovered": change.recovered.way} if change.recovered else {}


def _expected(change: AdapterDelta, side: Side) -> Mapping[str, str]:
    """The checksums that the weights must have, as far as they are known."""
    manifest = change.manifest
    if manifest is None:
        return {}
    if side == "base":
        return manifest.base.fingerprint.tensors if manifest.base else {}
    if change.is_lost and change.residual is not None and not has_manifest(change.residual):
        return {}
    if manifest.kind == "decomposed":
        return manifest.checksums
    return manifest.residual.fingerprint.tensors if manifest.residual else {}
