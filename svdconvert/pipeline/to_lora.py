"""to-lora: the change made by training is written as a LoRA for the untouched base.

It has scale 1, one rank and no patterns, so that every inference engine reads it the same way.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import hypot
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from svdconvert.adapters import rwkv_peft
from svdconvert.adapters.stacked import Stack
from svdconvert.checkpoint.tensors import dtype_code, tensor_bytes
from svdconvert.checkpoint.values import cast_finite
from svdconvert.config.execution import Run
from svdconvert.config.options import LoraOptions
from svdconvert.config.progress import report
from svdconvert.linalg.delta import Product
from svdconvert.linalg.low_rank import product_distance, product_norm, truncate
from svdconvert.manifest.fingerprint import checksum
from svdconvert.manifest.results import LoraResult
from svdconvert.manifest.schema import Manifest, roles_of
from svdconvert.output.plan import PlannedFile
from svdconvert.output.staging import StagedOutput
from svdconvert.pipeline.adapter_plan import write_stack
from svdconvert.pipeline.lora_plan import LoraPlan, exact_factors
from svdconvert.pipeline.runner import file_checksums, notes


@dataclass(frozen=True)
class LoraJob:
    """The conversion of one adapter."""

    plan: LoraPlan
    command: str = "to-lora"

    @property
    def options(self) -> LoraOptions:
        """The options as the user gave them."""
        return self.plan.options

    @property
    def files(self) -> list[PlannedFile]:
        """The adapter's file."""
        return [self.plan.file]

    @property
    def inputs(self) -> list[Path]:
        """Every directory that the adapter was read from."""
        return self.plan.delta.input_paths()

    def identity(self) -> dict[str, Any]:
        """The adapter."""
        return {"adapter": self.plan.delta.identity(), **self.plan.format.identity()}

    def write(self, staged: StagedOutput, run: Run) -> None:
        """Write the factors of every module and the parameters trained in full."""
        modules = self.plan.delta.modules
        done = 0
        for module in self.plan.form.pieces:
            if module not in staged.finished:
                staged.finish(module, _write_module(self.plan, module, staged))
            done += 1
            report(None, done, len(modules), "modules", name=module)
        for stack in self.plan.form.stacks:
            _write_experts(self.plan, stack, staged)
            done += len(stack.members)
            report(None, done, len(modules), "modules", name=stack.parameter)
        for parameter, name in self.plan.keys.extras.items():
            if name not in staged.finished:
                tensor = cast_finite(parameter, self.plan.delta.parameter(parameter), self.plan.dtype)
                staged.write(self.plan.file.path, name, tensor)
                checksums = {name: checksum(tensor_bytes(tensor))}
                staged.finish(name, {"files": {self.plan.file.path: checksums}})

    def write_sidecars(self, directory: Path) -> None:
        """What the format has in addition to the factors: a configuration, a tokenizer."""
        self.plan.format.write_sidecars(self.plan.delta, self.plan.form, self.plan.rank, directory)

    def manifest(self, staged: StagedOutput, threads: int) -> Manifest:
        """The manifest of the LoRA."""
        delta = self.plan.delta
        known = delta.manifest
        measured = notes(staged, delta.modules).values()
        missed = _missed(known)
        norm = hypot(*(note["norm"] for note in measured))
        lost = hypot(*(note["lost"] for note in measured))
        return Manifest(
            kind="lora",
            layout=known.layout if known else _layout_of_file(delta.directory),
            method=known.method if known else "lora",
            base=known.base if known else None,
            options=asdict(self.options),
            result=LoraResult(
                rank=self.plan.rank,
                truncation=self.plan.truncation.result() if self.plan.truncation else None,
                rounding=lost / norm if norm else 0.0,
                norm=norm,
                missed=sum(missed.values()) / len(missed) if missed else None,
                recovered=delta.recovered.result() if delta.recovered else None,
                head=known.head if known else None,
            ),
            training=delta.training,
            files=file_checksums(staged),
            roles=roles_of(self.files),
        )

    def remarks(self, manifest: Manifest) -> Iterator[str]:
        """A warning if the LoRA changes nothing, and what it misses of a start in 4 bits."""
        assert isinstance(manifest.result, LoraResult)
        if not manifest.result.norm:
            yield (
                f"the LoRA changes nothing: the factors of {self.plan.delta.directory} are those from before "
                "training"
            )
        if missed := _missed(self.plan.delta.manifest):
            worst = max(missed, key=missed.__getitem__)
            yield (
                f"{self.plan.delta.directory} was trained on a residual in 4 bits: on the untouched base the "
                f"LoRA misses W - (Q + s B0 A0), {manifest.result.missed:.1%} of the norm of a matrix on "
                f"average ({missed[worst]:.1%} of {worst}); merge --from residual keeps it"
            )


def _missed(manifest: Manifest | None) -> dict[str, float]:
    """||W - (Q + s B0 A0)|| / ||W|| of the matrices whose residual Q is in 4 bits, by tensor."""
    matrices = manifest.matrices if manifest else {}
    return {name: matrix.error for name, matrix in matrices.items() if matrix.quantised is not None}


def _write_module(plan: LoraPlan, module: str, staged: StagedOutput) -> dict[str, Any]:
    left, right = _factors(plan, module)
    missing = plan.rank - left.shape[1]
    padded = {"lora_A": pad(right, (0, 0, 0, missing)), "lora_B": pad(left, (0, missing))}
    checksums: dict[str, str] = {}
    stored = {
        factor: cast_finite(f"{module}.{factor}", tensor, plan.dtype) for factor, tensor in padded.items()
    }
    for written, rows in plan.form.pieces[module]:
        for factor in padded:
            own = stored[factor][rows.slice].contiguous() if rows and factor == "lora_B" else stored[factor]
            name = plan.keys.pieces[written, factor]
            own = own.T.contiguous() if module in plan.delta.adapter.embeddings else own
            own = plan.format.stored(written, factor, own)
            staged.write(plan.file.path, name, own)
            checksums[name] = checksum(tensor_bytes(own))
    return {
        "files": {plan.file.path: checksums},
        "note": _note(plan, left, right, (stored["lora_B"], stored["lora_A"])),
    }


def _factors(plan: LoraPlan, module: str) -> Product:
    left, right = exact_factors(plan.delta, module)
    return truncate(left, right, plan.truncation.ranks[module]) if plan.truncation else (left, right)


def _note(plan: LoraPlan, left: Tensor, right: Tensor, stored: Product) -> dict[str, float]:
    lost = 0.0 if plan.dtype == torch.float32 else product_distance(left, right, *stored)
    return {"norm": product_norm(left, right), "lost": lost}


def _write_experts(plan: LoraPlan, stack: Stack, staged: StagedOutput) -> None:
    """Write the factors of all experts of a parameter, which are in memory together."""
    if all(member.module in staged.finished for member in stack.members):
        return
    notes: dict[str, dict[str, float]] = {}
    factors: dict[tuple[str, str], Tensor] = {}
    for member in stack.members:
        left, right = _factors(plan, member.module)
        missing = member.rank - left.shape[1]  # a truncation to rank 0 is written as rank 1
        stored = {
            "lora_B": cast_finite(f"{member.module}.lora_B", pad(left, (0, missing)), plan.dtype),
            "lora_A": cast_finite(f"{member.module}.lora_A", pad(right, (0, 0, 0, missing)), plan.dtype),
        }
        factors |= {(member.module, factor): tensor for factor, tensor in stored.items()}
        notes[member.module] = _note(plan, left, right, (stored["lora_B"], stored["lora_A"]))

    def read(module: str, factor: str, rows: slice) -> Tensor:
        return factors[module, factor][rows]

    write_stack(staged, plan.file.path, stack, dtype_code(plan.dtype), read)
    for module, note in notes.items():
        staged.finish(module, {"files": {}, "note": note})


def _layout_of_file(path: Path) -> str:
    """The layout of an adapter without a manifest; empty if its format does not determine it."""
    return rwkv_peft.LAYOUT if rwkv_peft.is_adapter_file(path) else ""
