"""The weight matrices in the repeated blocks of a network, and the role of each one.

What PEFT calls all-linear, without what it should not have: routers, output heads and what is outside the
repeated blocks. The fused experts, which are no linear layers, are added.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from svdconvert.models.roles import ROUTERS, expert_role, role_of, tower_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EXPERTS = re.compile(r"(?:^|\.)experts?(?:\.|$)|Experts?$", re.IGNORECASE)
_STACKED = 3  # axes of a parameter with the matrices of all experts


@dataclass(frozen=True, slots=True)
class NetworkMatrix:
    """A weight matrix, or the stacked matrices of all experts, of a network."""

    parameter: str
    """The path of the parameter."""
    role: str
    layer: int
    shape: tuple[int, ...]
    transposed: bool = False
    """True if it is (in, out) or, of experts, (experts, in, out), as PEFT sees it."""
    interleaved: bool = False
    """True if the rows of gate and up alternate in a parameter that combines them."""

    @property
    def module(self) -> str:
        """The path of the module."""
        return self.parameter.rpartition(".")[0]

    @property
    def is_stacked(self) -> bool:
        """True if it has the matrices of all experts."""
        return len(self.shape) == _STACKED


@dataclass(frozen=True)
class NetworkMatrices:
    """The matrices of a network that can be adapted, and those in its blocks that are left out."""

    known: Mapping[str, NetworkMatrix]
    """By parameter."""
    left_out: dict[str, str]
    """Parameter of a matrix in the blocks without a role -> why."""


def find_matrices(network: Any, heads: set[int]) -> NetworkMatrices:
    """The matrices of a PreTrainedModel; `heads` are the ids of its output heads."""
    found: dict[str, NetworkMatrix] = {}
    left_out: dict[str, str] = {}
    blocks = _Blocks(network)
    for path, module in network.named_modules():
        if id(module) in heads or (place := blocks.place(path)) is None:
            continue
        prefix, layer, rest = place
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            shape = tuple(parameter.shape)
            if not _is_matrix(path, module, name, shape):
                if reason := _why_no_matrix(path, module, shape):
                    left_out[full] = reason
                continue
            if reason := _unsuitable(network, path, module, shape):
                left_out[full] = reason
                continue
            experts = len(shape) == _STACKED
            role = ".".join(
                part for part in (prefix, expert_role(name) if experts else role_of(rest)) if part
            )
            found[full] = NetworkMatrix(
                full,
                role,
                layer,
                shape,
                transposed=bool(getattr(module, "is_transposed", False)) if experts else is_conv1d(module),
                interleaved=experts and not getattr(module, "is_concatenated", True),
            )
    return NetworkMatrices(found, left_out)


def _is_router(path: str, module: nn.Module) -> bool:
    return path.rpartition(".")[2].lower() in ROUTERS or "Router" in type(module).__name__


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D, a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_matrix(path: str, module: nn.Module, name: str, shape: tuple[int, ...]) -> bool:
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return name == "weight"
    if len(shape) == _STACKED and not isinstance(module, _CONVOLUTIONS):
        # Older versions of transformers give some classes of experts names such as DeepseekV3NaiveMoe.
        return bool(_EXPERTS.search(type(module).__name__) or _EXPERTS.search(path.rpartition(".")[2]))
    return False


def _why_no_matrix(path: str, module: nn.Module, shape: tuple[int, ...]) -> str | None:
    """Why a parameter is no matrix that can be adapted; None if nobody expects it to be one."""
    if len(shape) not in (2, _STACKED) or isinstance(module, (nn.Embedding, *_CONVOLUTIONS)):
        return None
    if len(shape) == _STACKED:
        return None if 1 in shape else "no linear layer and no experts"
    return "a router" if _is_router(path, module) else "no linear layer"


def _unsuitable(network: Any, path: str, module: nn.Module, shape: tuple[int, ...]) -> str | None:
    """Why the linear layer at `path` is not adapted; None if it is."""
    if 1 in shape[-2:]:
        return "a vector"
    if isinstance(module, nn.Linear) and not _is_ordinary(module):
        return f"{type(module).__name__} does not multiply its input by its weight"
    parent, _, leaf = path.rpartition(".")
    holder = network.get_submodule(parent)
    is_mixer = hasattr(holder, "ssm_state_size") and leaf != "in_proj"
    if is_mixer or isinstance(holder, nn.MultiheadAttention):
        return f"{type(holder).__name__} reads its weight without calling it"
    if "Router" in type(holder).__name__ or leaf.lower() in ROUTERS and _has_experts(holder):
        return "a router"
    return None


def _is_ordinary(linear: nn.Linear) -> bool:
    """True if a linear layer, also one with a forward of its own, maps (1, 1, in) to (1, 1, out)."""
    if type(linear).forward is nn.Linear.forward:
        return True
    try:
        out = linear(torch.empty(1, 1, linear.in_features, dtype=linear.weight.dtype, device="meta"))
    except Exception:  # code of a model
        return False
    return isinstance(out, torch.Tensor) and out.shape == (1, 1, linear.out_features)


def _has_experts(module: nn.Module) -> bool:
    return any(
        _EXPERTS.search(name) or _EXPERTS.search(type(child).__name__)
        for name, child in module.named_children()
    )


class _Blocks:
    """Which modules are inside the repeated blocks, and of what part of the network."""

    def __init__(self, network: Any) -> None:
        self._lists = {
            path
            for path, module in network.named_modules()
            if isinstance(module, nn.ModuleList) and any(True for child in module for _ in child.children())
        }
        config = network.config
        self._coder = bool(getattr(config, "is_encoder_decoder", False))
        text = config if self._coder else config.get_text_config(decoder=True)
        self._owners = dict(_owners(network, config, text))

    def place(self, path: str) -> tuple[str, int, str] | None:
        """(prefix of the role, number of the block, path within it) of a module; None outside the blocks."""
        tower = self._tower(path)
        parts = path.split(".")
        for end in range(1, len(parts)):
            if parts[end].isdigit() and ".".join(parts[:end]) in self._lists:
                rest = ".".join(parts[end + 1 :])
                prefix = tower or (self._side(parts[:end]) if self._coder else "")
                return (prefix, int(parts[end]), rest) if rest else None
        return (tower, 0, ".".join(parts[-2:])) if tower else None

    def _tower(self, path: str) -> str:
        """vision or audio for a module of a tower, or of what connects it to the language model."""
        for owner, tower in self._owners.items():
            if path == owner or path.startswith(f"{owner}."):
                return tower
        return ""

    def _side(self, parts: Iterable[str]) -> str:
        return next((part for part in parts if part in ("encoder", "decoder")), "")


def _owners(network: Any, config: Any, text: Any) -> Iterator[tuple[str, str]]:
    """(path, role) of the parts of a network with several configurations that are no language model."""
    if text is config:
        return
    language: list[str] = []
    for path, module in network.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in language)
        if path and not inside and type(getattr(module, "config", None)) is type(text):
            language.append(path)
    if not language:
        return
    ancestors = {""} | {one[: dot.start()] for one in language for dot in re.finditer(r"\.", one)}
    for path, module in network.named_modules():
        if path and path not in ancestors and path not in language and path.rpartition(".")[0] in ancestors:
            yield path, tower_of(f"{path} {type(module).__name__}", is_tower=True)
