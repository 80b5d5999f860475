"""What an adapter directory changes: the factors before training and after, matrix by matrix."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdconvert.adapters.peft_files import Adapter, is_adapter, open_adapter
from svdconvert.adapters.rwkv_peft import FILE, is_adapter_file, open_adapter_file
from svdconvert.errors import ArtifactError
from svdconvert.inputs.recovered_init import RecoveredInit
from svdconvert.linalg.factors import Factors
from svdconvert.manifest.schema import PLAIN, Manifest, has_manifest, read_manifest
from svdconvert.methods.base import init_folder

# What PEFT calls a start that changes the base.
_REBASED = ("pissa", "olora", "corda", "lora_ga", "loftq")


NO_START = "none"
"""What --init says of an adapter that started at zero, on the untouched base."""


@dataclass(frozen=True)
class AdapterDelta:
    """An adapter and its start."""

    directory: Path
    after: Adapter
    before: Adapter | None
    """The initial adapter; None where it was zero (a plain LoRA on the untouched base)."""
    manifest: Manifest | None
    """Of the directory, or of the residual that was named; None for an adapter of unknown origin."""
    residual: Path | None = None
    """The residual's directory, where it was named or the adapter names it."""
    is_lost: bool = False
    """True where it did not start at zero, and from what it did is not stored."""
    recovered: RecoveredInit | None = None
    """The start, found again from the weights."""

    def start(self, module: str) -> tuple[Factors, float]:
        """The factors before training, and their scale."""
        if self.recovered is not None:
            return self.recovered.factors(module), self.recovered.scales[module]
        assert not self.is_lost, "nobody found the start again"
        if self.before is not None:
            return self.before.factors(module), self.before.config.scale(module)
        end = self.after.factors(module)
        return Factors(torch.zeros_like(end.left_OR), end.right_RI, end.core), 1.0

    def end(self, module: str) -> tuple[Factors, float]:
        """The factors after training, and their scale."""
        return self.after.factors(module), self.after.config.scale(module)

    def extra(self, parameter: str) -> Tensor:
        """What a parameter that was trained whole has become."""
        return self.after.source.read(self.after.extras[parameter])

    def places(self) -> list[Path]:
        """The directories that it is read from, and its residual's, without which it is worth nothing."""
        residual = self.manifest.residual if self.manifest else None
        return [
            self.directory,
            *([self.before.directory] if self.before else []),
            *([Path(residual.location)] if residual and Path(residual.location).exists() else []),
        ]

    def identity(self) -> dict[str, Any]:
        """What a run that reads it must find again when it goes on."""
        start = self.before.source.file_versions() if self.before else {}
        start = self.recovered.file_versions() if self.recovered else start
        return {
            "location": str(self.directory.absolute()),
            "files": dict(self.after.source.file_versions()),
            "start": dict(start),
        }

    @property
    def modules(self) -> list[str]:
        """The adapted modules, in the order of the adapter's file."""
        return list(self.after.modules)

    def tensors(self) -> Mapping[str, str]:
        """Tensor name in the base -> module, from the manifest."""
        assert self.manifest is not None
        return {name: matrix.module for name, matrix in self.manifest.matrices.items()}


def open_adapter_delta(
    directory: Path, *, residual: str | None = None, init: str | None = None, alpha: float | None = None
) -> AdapterDelta:
    """Open a DECOMPOSED, TRAINED or LORA directory, any adapter in PEFT's format, or RWKV-PEFT's file.

    `residual` (a DECOMPOSED directory, or a plain residual without its start) or `init` (an adapter, or
    "none") is where an adapter trained elsewhere started, and `alpha` what it was scaled with where it does
    not say so. Raises ArtifactError where the start is missing or does not fit.
    """
    if is_adapter_file(directory):
        return _from_file(directory, init, alpha)
    if alpha is not None:
        raise ArtifactError(f"{directory} says its own alpha; --alpha is for files of RWKV-PEFT")
    if not directory.is_dir():
        raise ArtifactError(
            f"{directory} does not exist; give a directory that decompose or train wrote, or an adapter"
        )
    start = Path(init) if init not in (None, NO_START) else None
    base = Path(residual) if residual is not None else None
    change = (
        _from_manifest(directory, base, start)
        if has_manifest(directory)
        else _from_peft(directory, base, start)
    )
    if change.before is not None:
        _fits(change.after, change.before)
    return change


def _from_file(path: Path, init: str | None, alpha: float | None) -> AdapterDelta:
    """RWKV-PEFT's file: PiSSA with the file it started from, or a LoRA with its alpha."""
    if init not in (None, NO_START):
        if alpha is not None:
            raise ArtifactError(f"{path} started from {init}, at scale 1; leave --alpha out")
        change = AdapterDelta(
            path, open_adapter_file(path, None), open_adapter_file(Path(str(init)), None), None
        )
        assert change.before is not None
        _fits(change.after, change.before)
        return change
    after = open_adapter_file(path, alpha)
    if alpha is None:
        raise ArtifactError(
            f"{path} does not say its scale; give the lora_alpha of its training with --alpha or, for PiSSA, "
            "its init_pissa.pth with --init"
        )
    return AdapterDelta(path, after, None, None)


def _from_manifest(directory: Path, residual: Path | None, init: Path | None) -> AdapterDelta:
    manifest = read_manifest(directory)
    if manifest.kind in PLAIN:
        raise ArtifactError(
            f"{directory} is {manifest.kind} already: a plain checkpoint, to be loaded as it is"
        )
    if manifest.kind == "lora":
        file = directory / FILE
        adapter = open_adapter_file(file, None) if file.is_file() else open_adapter(directory)
        return AdapterDelta(directory, adapter, None, manifest)
    start = init or directory / init_folder(manifest.method)
    if not is_adapter(start) and residual is not None:
        return _against(directory, open_adapter(directory), residual, None, manifest)
    if not is_adapter(start):
        raise ArtifactError(
            f"{start} is missing, without which the change cannot be told from the start; copy it from the "
            "decomposed directory, name another with --init, or give --base and --residual to recover it"
        )
    before = open_adapter(start)
    after = before if manifest.kind == "decomposed" else open_adapter(directory)
    return AdapterDelta(
        directory, after, before, manifest, directory if manifest.kind == "decomposed" else None
    )


def _from_peft(directory: Path, residual: Path | None, init: Path | None) -> AdapterDelta:
    if not is_adapter(directory):
        raise ArtifactError(
            f"{directory} is neither a directory of svdconvert nor an adapter: there is no svdconvert.json "
            "and no adapter_config.json; give what decompose, train or PEFT wrote"
        )
    after = open_adapter(directory)
    named = Path(after.config.base) if after.config.base else None
    if (
        residual is None
        and named is not None
        and has_manifest(named)
        and read_manifest(named).kind == "decomposed"
    ):
        residual = named
    if residual is not None:
        return _against(directory, after, residual, init, None)
    if init is not None:
        return AdapterDelta(directory, after, open_adapter(init), None)
    return AdapterDelta(directory, after, None, None, is_lost=changes_the_base(after.config.initialised))


def _against(
    directory: Path, after: Adapter, residual: Path, init: Path | None, own: Manifest | None
) -> AdapterDelta:
    """An adapter that was trained on `residual`; the start is that directory's, or lost."""
    manifest = own
    if has_manifest(residual):
        found = read_manifest(residual)
        if found.kind != "decomposed":
            raise ArtifactError(
                f"{residual} is a {found.kind} directory; --residual wants what decompose wrote, or a plain "
                "residual"
            )
        manifest = own or found
        init = init or residual / init_folder(found.method)
    if init is not None and is_adapter(init):
        return AdapterDelta(directory, after, open_adapter(init), manifest, residual)
    return AdapterDelta(directory, after, None, manifest, residual, is_lost=True)


def changes_the_base(initialised: str | bool) -> bool:
    """True for what PEFT calls a start that is taken out of the base."""
    return str(initialised).lower().startswith(_REBASED)


def _fits(after: Adapter, before: Adapter) -> None:
    if absent := sorted(set(after.modules) ^ set(before.modules)):
        raise ArtifactError(
            f"{before.directory} is not the start of {after.directory}: {absent[0]} is in one only "
            f"({len(absent)} such modules); name the right one with --init"
        )
    for module in after.modules:
        for piece, side in (("lora_A", 1), ("lora_B", 0)):
            now, then = after.shape(module, piece), before.shape(module, piece)
            if now[side] != then[side]:
                raise ArtifactError(
                    f"{before.directory} is not the start of {after.directory}: {module}.{piece} has the "
                    f"shape {then} and {now}; name the right one with --init"
                )
