"""to-lora: the change made by training is written as a LoRA for the untouched base.

It has scale 1, one rank and no patterns, so that every inference engine reads it the same way.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import hypot
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from svdconvert.adapters import rwkv_peft
from svdconvert.adapters.adapter_config import CONFIG, WITH_PARAMETERS, AdapterConfig
from svdconvert.adapters.extra_parameters import contains_adapters
from svdconvert.checkpoint.tensors import tensor_bytes
from svdconvert.checkpoint.values import cast_finite
from svdconvert.config.execution import Run
from svdconvert.config.options import LoraOptions
from svdconvert.config.progress import Progress
from svdconvert.hub.reference import is_repository
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.linalg.low_rank import product_distance, product_norm, truncate
from svdconvert.manifest.fingerprint import checksum
from svdconvert.manifest.results import LoraResult
from svdconvert.manifest.schema import Manifest, roles_of
from svdconvert.output.plan import PlannedFile
from svdconvert.output.staging import StagedOutput
from svdconvert.output.tokenizer_files import copy_tokenizer
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
        return {"adapter": self.plan.delta.identity()}

    def write(self, staged: StagedOutput, run: Run) -> None:
        """Write the factors of every module and the parameters trained in full."""
        modules = self.plan.delta.modules
        for done, module in enumerate(modules, 1):
            if module not in staged.finished:
                staged.finish(module, _write_module(self.plan, module, staged))
            run.track(Progress(module, self.plan.file.path, done, len(modules)))
        for parameter, name in self.plan.keys.extras.items():
            if name not in staged.finished:
                tensor = cast_finite(parameter, self.plan.delta.parameter(parameter), self.plan.dtype)
                staged.write(self.plan.file.path, name, tensor)
                checksums = {name: checksum(tensor_bytes(tensor))}
                staged.finish(name, {"files": {self.plan.file.path: checksums}})

    def write_sidecars(self, directory: Path) -> None:
        """The configuration, if the format has one, and the adapter's own tokenizer."""
        if self.options.format == "peft":
            (directory / CONFIG).write_text(_config(self.plan).text())
            copy_tokenizer(self.plan.delta.directory, directory)

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
    left, right = exact_factors(plan.delta, module)
    if plan.truncation is not None:
        left, right = truncate(left, right, plan.truncation.ranks[module])
    norm = product_norm(left, right)
    missing = plan.rank - left.shape[1]
    padded = {"lora_A": pad(right, (0, 0, 0, missing)), "lora_B": pad(left, (0, missing))}
    tensors = {
        plan.keys.pieces[module, factor]: cast_finite(f"{module}.{factor}", tensor, plan.dtype)
        for factor, tensor in padded.items()
    }
    for name, tensor in tensors.items():
        staged.write(plan.file.path, name, tensor)
    checksums = {name: checksum(tensor_bytes(tensor)) for name, tensor in tensors.items()}
    stored = [tensors[plan.keys.pieces[module, factor]] for factor in ("lora_B", "lora_A")]
    lost = 0.0 if plan.dtype == torch.float32 else product_distance(left, right, *stored)
    return {"files": {plan.file.path: checksums}, "note": {"norm": norm, "lost": lost}}


def _config(plan: LoraPlan) -> AdapterConfig:
    """Scale 1 (alpha is the rank), no rslora, no patterns; the base is named if it is on the Hub."""
    own = plan.delta.adapter.config
    mixed = contains_adapters(plan.delta.adapter.extras, plan.delta.modules)
    return AdapterConfig(
        rank=plan.rank,
        alpha=plan.rank,
        targets=own.targets,
        base=_base_repository(plan.delta),
        task=own.task,
        modules_to_save=own.modules_to_save,
        bias=own.bias,
        peft_type=WITH_PARAMETERS if mixed else "LORA",
    )


def _base_repository(delta: AdapterDelta) -> str | None:
    """org/name of the untouched base, as the manifest or an adapter that started at zero names it."""
    if delta.manifest is not None:
        base = delta.manifest.base
        return base.location if base and base.revision else None
    named = delta.adapter.config.base
    started_at_zero = delta.initial_adapter is None and delta.recovered is None and delta.residual is None
    return named if started_at_zero and is_repository(named) else None


def _layout_of_file(path: Path) -> str:
    """The layout of an adapter without a manifest; empty if its format does not determine it."""
    return rwkv_peft.LAYOUT if rwkv_peft.is_adapter_file(path) else ""
