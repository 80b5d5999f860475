"""extract: the difference of two checkpoints is written as a LoRA, one matrix at a time.

First every matrix gets factors, which are stored in the staging directory: which matrices changed at all, and
with which ranks, is only known when all have been read. Then one file with one rank is written from them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import hypot, isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdconvert.adapters.peft_files import WEIGHTS
from svdconvert.checkpoint.tensors import REAL, same_bytes
from svdconvert.config.execution import Run
from svdconvert.config.options import ExtractOptions
from svdconvert.errors import ArtifactError, TargetError
from svdconvert.inputs.config_differences import remarks_on_configs
from svdconvert.inputs.model import format_reference
from svdconvert.inputs.model_pair import Difference
from svdconvert.linalg.approximation import Approximation, of_rank, within
from svdconvert.linalg.blocks import total_energy
from svdconvert.linalg.low_rank import allocate_ranks
from svdconvert.linalg.threads import parallel_matrices, pick_device
from svdconvert.manifest.results import ExtractedMatrix, Extraction, LoraResult
from svdconvert.manifest.schema import Manifest
from svdconvert.output.plan import PlannedFile
from svdconvert.output.staging import StagedOutput
from svdconvert.pipeline.extract_plan import ExtractPlan, refuse_nothing
from svdconvert.pipeline.extracted_file import ExtractedLora, Scratch
from svdconvert.pipeline.runner import TensorJob, TensorResult, file_checksums, stream


@dataclass(frozen=True)
class ExtractJob:
    """The extraction of one LoRA."""

    plan: ExtractPlan
    difference: Difference
    command: str = "extract"

    @property
    def options(self) -> ExtractOptions:
        """The options as the user gave them."""
        return self.plan.options

    @property
    def files(self) -> list[PlannedFile]:
        """None: the adapter's file is planned when the ranks are known."""
        return []

    @property
    def inputs(self) -> list[Path]:
        """Both checkpoints."""
        return [model.path for model in self.plan.pair.models]

    def identity(self) -> dict[str, Any]:
        """Both checkpoints."""
        return self.plan.pair.identity()

    def write(self, staged: StagedOutput, run: Run) -> None:
        """Compare all tensors, approximate the matrices that changed, and write the adapter."""
        scratch = Scratch.in_staging(staged.path, list(self.plan.slots))
        scratch.forget_lost(staged)
        _compare_others(self.plan, self.difference, staged)
        ranks = _approximate(self, scratch, staged, run)
        refuse_nothing(self.plan, len(ranks))
        if run.ranks.leads:
            kept = [name for name in self.plan.keepable if staged.finished[name]["note"]["norm"]]
            lora = ExtractedLora(self.plan, ranks, tuple(sorted(kept)))
            staged.finish(_ADAPTER, lora.write(scratch, staged))
        staged.gather()  # so that every rank knows the result

    def write_sidecars(self, directory: Path) -> None:
        """Nothing but the adapter's own configuration, which is there already; the factors are deleted."""
        Scratch.in_staging(directory, []).remove()

    def manifest(self, staged: StagedOutput, threads: int) -> Manifest:
        """The manifest of the LoRA."""
        notes = {name: staged.finished[name]["note"] for name in (*self.plan.slots, *self.plan.others)}
        return Manifest(
            kind="lora",
            layout=self.plan.layout_name,
            method="lora",
            base=self.plan.pair.base.origin({name: note["checksum"] for name, note in notes.items()}),
            options=asdict(self.options),
            result=_result(self.plan, notes, staged.finished[_ADAPTER]["note"]),
            files=file_checksums(staged),
            roles={WEIGHTS: "adapter"},
            threads=threads,
            command=self.command,
        )

    def remarks(self, manifest: Manifest) -> Iterator[str]:
        """Which tensors changed and are not in the LoRA, and which settings differ."""
        assert isinstance(manifest.result, LoraResult) and manifest.result.extracted
        yield from remarks_on_configs(self.plan.pair.base, [self.plan.pair.tuned])
        omitted = manifest.result.extracted.omitted
        if omitted:
            yield (
                f"{len(omitted)} tensors changed and are not in the LoRA, such as "
                f"{max(omitted, key=lambda name: omitted[name])}; the stated error includes them"
            )


def _compare_others(plan: ExtractPlan, difference: Difference, staged: StagedOutput) -> None:
    """Measure the changes of the tensors that get no factors; each rank measures its share."""
    for name in plan.others[staged.ranks.index :: staged.ranks.count]:
        if name not in staged.finished:
            norm = _norm_of_change(plan, difference, name)
            note = {"norm": norm, "checksum": difference.checksums[name]}
            staged.finish(name, {"files": {}, "note": note})


def _norm_of_change(plan: ExtractPlan, difference: Difference, name: str) -> float:
    """||tuned - base||_F. Raises ArtifactError if they hold integers and differ, TargetError for NaN."""
    if not all(model.source.infos[name].dtype in REAL for model in plan.pair.models):
        equal = [
            before.dtype == after.dtype and same_bytes(before, after)
            for before, after in difference.blocks(name)
        ]
        if not all(equal):
            raise ArtifactError(
                f"{name} is stored as {plan.infos[name].dtype} and differs between "
                f"{' and '.join(str(model.path) for model in plan.pair.models)}: no LoRA can hold that change"
            )
        return 0.0
    changes = (
        after.double() - before.double()
        for before, after in difference.blocks(name)
        if before.dtype != after.dtype or not same_bytes(before, after)
    )
    return _finite(plan, name, sqrt(sum(float(change.square().sum()) for change in changes)))


def _finite(plan: ExtractPlan, name: str, norm: float) -> float:
    if not isfinite(norm):
        raise TargetError(
            f"{name} of {plan.pair.base.path} or {plan.pair.tuned.path} holds NaN, Inf or values whose "
            "squares overflow; repair the checkpoint"
        )
    return norm


def _approximate(job: ExtractJob, scratch: Scratch, staged: StagedOutput, run: Run) -> dict[str, int]:
    """Approximate the change of every matrix; tensor -> rank, for the matrices that changed.

    A budget is distributed by the singular values that are known. A matrix that gets a rank for all of its
    values may deserve more, so it is approximated again with twice as many, until none does.
    """
    plan = job.plan
    rooms = plan.first_ranks() if plan.options.rank_budget else {}
    while True:
        for name in rooms:
            if staged.finished.get(name, {}).get("note", {}).get("room") not in (None, rooms[name]):
                del staged.finished[name]
        stream(_work(job, rooms, scratch, run), job.difference, staged, run)
        notes = {name: staged.finished[name]["note"] for name in plan.slots}
        changed = {name: note for name, note in notes.items() if note["norm"]}
        if not plan.options.rank_budget:
            return {name: note["rank"] for name, note in changed.items()}
        sigmas = {name: torch.tensor(note["sigma"], dtype=torch.float64) for name, note in changed.items()}
        ranks = allocate_ranks(sigmas, plan.options.rank_budget) if sigmas else {}
        full = [name for name, rank in ranks.items() if rooms[name] == rank < min(plan.infos[name].shape)]
        full = [name for name in full if rooms[name] < plan.options.rank_budget]
        if not full:
            return ranks
        rooms |= {name: min(2 * rooms[name], *plan.infos[name].shape) for name in full}


def _work(job: ExtractJob, rooms: Mapping[str, int], scratch: Scratch, run: Run) -> TensorJob:
    """How the change of each matrix is approximated; nothing is copied."""
    device = pick_device(run.device, run.ranks.local)

    def compute(name: str, change: Tensor) -> TensorResult:
        norm = _finite(job.plan, name, sqrt(total_energy(change)))
        note: dict[str, Any] = {"norm": norm, "checksum": job.difference.checksums[name]}
        if name in rooms:
            note["room"] = rooms[name]
        if norm:
            found = _approximation(job.options, job.plan.fixed_rank or rooms.get(name), change, norm, name)
            note |= {"rank": len(found.sigma_R), "rest": found.rest, "stored": scratch.store(name, found)}
            note |= {"sigma": found.sigma_R.tolist()} if name in rooms else {}
        return TensorResult({}, note)

    return TensorJob(
        order=list(job.plan.slots),
        matrices=job.plan.slots,
        compute=compute,
        copies={},
        device=device,
        parallelism=parallel_matrices(device),
        origin=" or ".join(str(model.path) for model in job.plan.pair.models),
    )


def _approximation(
    options: ExtractOptions, rank: int | None, change: Tensor, norm: float, name: str
) -> Approximation:
    if rank is not None:
        return of_rank(change, norm, rank, name)
    share = options.tol if options.tol is not None else sqrt(1.0 - (options.energy or 0.0))
    return within(change, norm, share, name)


def _result(
    plan: ExtractPlan, notes: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]
) -> LoraResult:
    """What was measured of the tensors; `found` is the note of the adapter's file."""
    lost = {name: note["norm"] for name, note in notes.items() if note["norm"] and name not in found["kept"]}
    modules = {}
    for name, rank in found["ranks"].items():
        if rank:
            lost[name] = hypot(_rest(notes[name], rank), found["rounding"][name])
            norm = notes[name]["norm"]
            modules[plan.slots[name].module] = ExtractedMatrix(rank=rank, norm=norm, error=lost[name] / norm)
    norm = hypot(*(note["norm"] for note in notes.values()))
    held = hypot(*(notes[name]["norm"] for name, rank in found["ranks"].items() if rank))
    return LoraResult(
        rank=max(found["ranks"].values(), default=0),
        rounding=hypot(*found["rounding"].values()) / held if held else 0.0,
        norm=held,
        extracted=Extraction(
            tuned=format_reference(plan.pair.tuned.origin()),
            error=hypot(*lost.values()) / norm if norm else 0.0,
            norm=norm,
            kept=tuple(found["kept"]),
            omitted={name: size for name, size in lost.items() if not found["ranks"].get(name)},
            modules=modules,
        ),
    )


def _rest(note: Mapping[str, Any], rank: int) -> float:
    """||change - kept||_F of a matrix that is truncated to `rank`."""
    return hypot(note["rest"], *note.get("sigma", ())[rank:])


_ADAPTER = "the adapter's file"
"""The item of the journal for the adapter, in addition to one for each tensor."""
