"""A DoRA adapter as a LoRA: the best approximation of what it changes, whose rank is that of the base."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from svdconvert.adapters.peft_files import Adapter, key
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource, in_chunks, tensor_bytes
from svdconvert.errors import ArtifactError, RecipeError
from svdconvert.inputs.adapted_tensors import adapted_tensors
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.model import OpenModel
from svdconvert.inputs.tensor_names import Shares, read_matrix, shape_of_shares
from svdconvert.linalg.dora import scaled_rows
from svdconvert.linalg.solver import Solver

_SIDES = ("lora_B", "lora_A")


class DoraSource:
    """A TensorSource with the factors of the best approximations, which are computed when they are read."""

    def __init__(self, adapter: Adapter, base: TensorSource, shares: Shares, rank: int) -> None:
        """`shares` maps the adapter's modules to the tensors of `base`."""
        self._adapter = adapter
        self._base = base
        self._shares = shares
        self._owners: dict[str, tuple[str, int]] = {}
        self._ranks: dict[str, int] = {}
        self.infos: dict[str, TensorInfo] = dict(adapter.source.infos)
        self._last: tuple[str, tuple[Tensor, Tensor], tuple[float, float]] | None = None
        for module in shares:
            rows = adapter.shape(module, "lora_B")[0]
            columns = adapter.shape(module, "lora_A")[1]
            self._ranks[module] = min(rank, rows, columns)
            for side, shape in enumerate(((rows, self._ranks[module]), (self._ranks[module], columns))):
                own = key(module, _SIDES[side])
                self._owners[own] = (module, side)
                self.infos[own] = TensorInfo(own, shape, "F32")

    def read(self, name: str) -> Tensor:
        """A factor in float32, or another tensor of the adapter's file."""
        if name not in self._owners:
            return self._adapter.source.read(name)
        module, side = self._owners[name]
        return self._computed(module)[0][side]

    def lost(self, module: str) -> tuple[float, float]:
        """(||change - kept||_F, ||change||_F) of a module."""
        return self._computed(module)[1]

    def _computed(self, module: str) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
        """(factors, norms) of a module; those of the last one are kept."""
        if self._last is None or self._last[0] != module:
            weight_OI = read_matrix(self._base, self._shares[module]).float()
            left, right = self._adapter.factors(module).folded()
            scale = self._adapter.config.scale(module)
            change_OI = scaled_rows(weight_OI, left * scale, right, self._adapter.magnitude(module))
            change_OI.sub_(weight_OI)
            top = Solver(module, tol=1e-4).top(change_OI, self._ranks[module])
            root_R = top.sigma_R.sqrt()
            factors = ((top.left_OR * root_R).contiguous(), (root_R[:, None] * top.right_RI).contiguous())
            norm = float(torch.linalg.vector_norm(change_OI))
            rest = float(torch.linalg.vector_norm(change_OI.addmm_(*factors, alpha=-1.0)))
            self._last = (module, factors, (rest, norm))
        return self._last[1], self._last[2]

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        """The tensor's bytes in chunks of at most `size`."""
        return in_chunks(tensor_bytes(self.read(name))[section or slice(None)], size, buffer)

    def file_versions(self) -> Mapping[str, list[int]]:
        """Those of the adapter and of the base."""
        return {**self._adapter.source.file_versions(), **self._base.file_versions()}


def approximated_dora(delta: AdapterDelta, base: OpenModel | None, rank: int | None) -> AdapterDelta:
    """The delta with factors of rank `rank` in place of DoRA's, and what they lose; others as they are.

    Raises RecipeError without a rank, ArtifactError without the base.
    """
    if not delta.adapter.config.dora:
        return delta
    if rank is None:
        raise RecipeError(
            f"{delta.directory} is a DoRA adapter, which scales whole rows: a LoRA only approximates it; "
            "give its rank with --rank, or use merge, which is exact"
        )
    if base is None:
        raise ArtifactError(
            f"{delta.directory} is a DoRA adapter, whose change depends on its base; give that with --base"
        )
    shares = adapted_tensors(delta, base)
    divided = base.layout(delta.layout_name)[1].divided(base.source)
    for module in delta.modules:
        shape = delta.adapter.shape(module, "lora_B")[0], delta.adapter.shape(module, "lora_A")[1]
        if module not in shares or shape_of_shares(divided.infos, shares[module]) != shape:
            raise ArtifactError(
                f"{delta.directory} adapts {module} as {shape}, which {base.path} does not store with this "
                "shape; give the base that it was made for"
            )
    source = DoraSource(delta.adapter, divided, shares, rank)
    modules = {module: {side: key(module, side) for side in ("lora_A", "lora_B")} for module in shares}
    # As patterns, because a small matrix may have a smaller rank.
    ranks = {re.escape(module): source.infos[own["lora_A"]].shape[0] for module, own in modules.items()}
    config = replace(
        delta.adapter.config,
        dora=False,
        rank=rank,
        alpha=float(rank),
        rslora=False,
        rank_pattern=ranks,
        alpha_pattern={pattern: float(own) for pattern, own in ranks.items()},
    )
    adapter = replace(delta.adapter, config=config, source=source, modules=modules)
    return replace(delta, adapter=adapter, approximation=source.lost, uses_base=True)
