"""The adapter that `extract` writes, and the factors that are kept until its ranks are known."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from svdconvert.adapters.adapter_config import CONFIG, PER_EXPERT, WITH_PARAMETERS, AdapterConfig
from svdconvert.adapters.extra_parameters import contains_adapters, declaration, extra_key
from svdconvert.adapters.peft_files import WEIGHTS, adapter_infos, key, target_modules
from svdconvert.checkpoint.tensors import TensorInfo, dtype_code, tensor_bytes
from svdconvert.checkpoint.values import cast_finite
from svdconvert.inputs.adapted_tensors import HEADS, ties_embeddings
from svdconvert.linalg.approximation import Approximation
from svdconvert.linalg.factors import factor_shapes
from svdconvert.linalg.low_rank import product_distance
from svdconvert.manifest.fingerprint import CHUNK, Checksum, checksum, file_checksum
from svdconvert.output.plan import PlannedFile, plan_file
from svdconvert.output.staging import StagedOutput, os_errors_as_output_error
from svdconvert.pipeline.adapter_plan import Piece, pieces_of
from svdconvert.pipeline.adapter_targets import matrix_shape
from svdconvert.pipeline.extract_plan import ExtractPlan

CAUSAL_LM = "CAUSAL_LM"
_SIDES = ("lora_A", "lora_B")


@dataclass(frozen=True)
class Scratch:
    """Factors in the staging directory, one file for each matrix: B, then A, in float32."""

    directory: Path
    names: Mapping[str, int]
    """Tensor -> its number, which is the file's name."""

    @classmethod
    def in_staging(cls, staged: Path, names: list[str]) -> "Scratch":
        """The files of these tensors."""
        return cls(staged / "factors", {name: number for number, name in enumerate(names)})

    def path(self, name: str) -> Path:
        """The file of a tensor."""
        return self.directory / f"{self.names[name]}.f32"

    def store(self, name: str, found: Approximation) -> str:
        """Write the factors of a matrix; their checksum."""
        path = self.path(name)
        with os_errors_as_output_error(path):
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(".part")
            with part.open("wb") as stream:
                for tensor in (found.left_OR, found.right_RI):
                    stream.write(tensor_bytes(tensor.cpu()))
            os.replace(part, path)
            return file_checksum(path)

    def read(self, name: str, shape: tuple[int, ...], stored: int, rank: int) -> tuple[Tensor, Tensor]:
        """(B, A) of the `rank` largest singular values, of a matrix with factors for `stored` of them."""
        rows, columns = shape
        flat = torch.frombuffer(bytearray(self.path(name).read_bytes()), dtype=torch.float32)
        left_OR = flat[: rows * stored].view(rows, stored)
        right_RI = flat[rows * stored :].view(stored, columns)
        return left_OR[:, :rank], right_RI[:rank]

    def forget_lost(self, staged: StagedOutput) -> None:
        """Forget the finished matrices whose factors are no longer there, for example after a power cut."""
        for name in self.names:
            known = staged.finished.get(name, {}).get("note", {}).get("stored")
            path = self.path(name)
            if known is not None and not (path.is_file() and file_checksum(path) == known):
                del staged.finished[name]

    def remove(self) -> None:
        """Delete all factors. Raises OutputError if that fails: they are no part of the output."""
        if self.directory.exists():
            with os_errors_as_output_error(self.directory):
                shutil.rmtree(self.directory)


@dataclass(frozen=True)
class ExtractedLora:
    """What the adapter's file will hold."""

    plan: ExtractPlan
    ranks: Mapping[str, int]
    """Tensor -> rank, for the matrices that changed; those of rank 0 get no factors."""
    kept: tuple[str, ...]
    """Tensors of the tuned checkpoint that are stored in full."""

    @property
    def rank(self) -> int:
        """The rank in the configuration; factors of smaller ranks are padded with zeros."""
        return max(self.ranks.values())

    @property
    def modules(self) -> dict[str, str]:
        """Tensor -> module, for the matrices with factors."""
        return {name: self.plan.slots[name].module for name, rank in self.ranks.items() if rank}

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The modules of the adapter that hold the factors of a matrix."""
        slot = self.plan.slots[name]
        return pieces_of(slot, matrix_shape(self.plan.infos[name], slot)[0], WEIGHTS, joint=False)

    @property
    def parameters(self) -> dict[str, str]:
        """Tensor -> its name at run time, for what is stored in full."""
        return {name: self.plan.layout.runtime_name(name) for name in self.kept}

    @property
    def tied_head(self) -> str | None:
        """The head's parameter if embeddings are stored that it is tied to: PEFT's files have both."""
        return f"{HEADS[0]}.weight" if self._tied_embeddings else None

    @property
    def _tied_embeddings(self) -> str | None:
        """The embeddings that are stored and to which the base ties its head; None if there are none."""
        found = [name for name in self.kept if name.endswith("embed_tokens.weight")]
        is_decoder = self.plan.layout.task_of(self.plan.infos) == CAUSAL_LM
        return found[0] if found and is_decoder and ties_embeddings(self.plan.pair.base.config) else None

    def keys(self) -> dict[str, str]:
        """Name in the file -> tensor, for what is stored in full."""
        adapted = self.modules.values()
        named = {extra_key(parameter, adapted): name for name, parameter in self.parameters.items()}
        if self.tied_head and self._tied_embeddings:
            named[extra_key(self.tied_head, adapted)] = self._tied_embeddings
        return named

    def file(self) -> PlannedFile:
        """The file of the factors and of what is stored in full."""
        code = dtype_code(getattr(torch, self.plan.options.dtype))
        infos: list[TensorInfo] = []
        for name in self.modules:
            rows, columns = matrix_shape(self.plan.infos[name], self.plan.slots[name])
            for piece in self.pieces(name):
                shapes = factor_shapes(piece.rows.size if piece.rows else rows, columns, self.rank)
                infos += adapter_infos(piece.module, {side: shapes[side] for side in _SIDES}, code)
        tuned = self.plan.pair.tuned.source.infos
        infos += [
            TensorInfo(stored, tuned[name].shape, tuned[name].dtype) for stored, name in self.keys().items()
        ]
        return plan_file(WEIGHTS, infos, "adapter")

    def config(self) -> AdapterConfig:
        """Scale 1 (alpha is the rank), no rslora, no patterns; the base is named if it is on the Hub."""
        infos = self.plan.infos
        linears = {self.plan.layout.module(name) for name, info in infos.items() if len(info.shape) == 2}
        modules = [piece.module for name in self.modules for piece in self.pieces(name)]
        parameters = [*self.parameters.values(), *([self.tied_head] if self.tied_head else [])]
        saved, bias = declaration(parameters, modules)
        mixed = contains_adapters(self.parameters.values(), modules)
        base = self.plan.pair.base
        kind = PER_EXPERT if self.plan.per_expert else WITH_PARAMETERS if mixed else "LORA"
        return AdapterConfig(
            rank=self.rank,
            alpha=self.rank,
            targets=target_modules(modules, linears),
            base=base.snapshot.hub_id,
            task=self.plan.layout.task_of(infos),
            modules_to_save=saved,
            bias=bias,
            peft_type=kind,
            fan_in_fan_out=self.plan.layout.fan_in_fan_out,
            ties_saved_modules=self.tied_head is not None,
        )

    def write(self, scratch: Scratch, staged: StagedOutput) -> dict[str, Any]:
        """Write the file and its configuration; the record of what was written."""
        staged.add(self.file())
        checksums: dict[str, str] = {}
        rounding = {}
        for name in self.modules:
            stored = staged.finished[name]["note"]["rank"]
            factors = scratch.read(name, self.plan.infos[name].shape, stored, self.ranks[name])
            rounding[name] = self._write_factors(name, factors, staged, checksums)
        for stored_name, name in self.keys().items():
            hasher = Checksum()
            chunks = self.plan.pair.tuned.source.chunks(name, CHUNK)
            staged.write_bytes(WEIGHTS, stored_name, chunks, hasher.update)
            checksums[stored_name] = hasher.text()
        with os_errors_as_output_error(staged.path):
            (staged.path / CONFIG).write_text(self.config().text(), encoding="utf-8")
        note = {"ranks": dict(self.ranks), "kept": list(self.kept), "rounding": rounding}
        return {"files": {WEIGHTS: checksums}, "note": note}

    def _write_factors(
        self, name: str, factors: tuple[Tensor, Tensor], staged: StagedOutput, checksums: dict[str, str]
    ) -> float:
        """Write the padded factors of a matrix; the Frobenius norm of what rounding changed."""
        place = self.plan.slots[name].place
        left, right = (factors[1].T, factors[0].T) if place is not None and place.transposed else factors
        missing = self.rank - left.shape[1]
        padded = {"lora_A": pad(right, (0, 0, 0, missing)), "lora_B": pad(left, (0, missing))}
        dtype: torch.dtype = getattr(torch, self.plan.options.dtype)
        written = {
            side: cast_finite(f"{name}.{side}", tensor, dtype).contiguous() for side, tensor in padded.items()
        }
        for piece in self.pieces(name):
            for side, tensor in written.items():
                stored = key(piece.module, side)
                own = tensor[piece.rows.slice].contiguous() if piece.rows and side == "lora_B" else tensor
                staged.write(WEIGHTS, stored, own)
                checksums[stored] = checksum(tensor_bytes(own))
        if dtype == torch.float32:
            return 0.0
        return product_distance(left, right, written["lora_B"], written["lora_A"])
