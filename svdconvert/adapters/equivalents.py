"""LoRAs that equal adapters of other types: AdaLoRA, LoHa, LoKr, VeRA and MiSS, as PEFT 0.21 saves them.

O: out features, I: in features, R: rank of the type, K: rank of the LoRA. Every type is a product of factors,
so that its LoRA is exact; the type's scale is in B.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from svdconvert.adapters.adapter_config import AdapterConfig
from svdconvert.errors import ArtifactError

Product = tuple[Tensor, Tensor]
"""(left_OK, right_KI)."""
Shape = tuple[int, ...]
_MOST_VALUES = 1 << 30  # of the factors of one matrix


@dataclass(frozen=True, kw_only=True)
class AdapterType:
    """A type of adapter: the pieces of a module in its file, and the LoRA that they equal."""

    pieces: tuple[str, ...]
    """The last parts of the names of a module's tensors."""
    required: tuple[str, ...]
    """Pieces that every module has, of which one names it."""
    rank: Callable[[Mapping[str, Shape], Shape], int]
    """(shapes of the pieces, (O, I)) -> K."""
    factors: Callable[[Mapping[str, Tensor], Shape, float], Product]
    """(pieces in float32, (O, I), scale) -> the LoRA's factors."""
    shape: Callable[[Mapping[str, Shape]], Shape | None] = lambda shapes: None
    """(O, I) by the shapes of the pieces; None if the file does not tell it."""
    scale: Callable[[AdapterConfig, str, int], float] = lambda config, module, rank: 1.0
    """(configuration, module, K) -> scale."""
    rank_key: str = "r"
    """The rank's key in adapter_config.json."""
    alpha_key: str | None = None
    """That of alpha; None if the type has none."""
    shared: tuple[str, ...] = ()
    """Tensors that all modules have in common."""


def _alpha_over_rank(config: AdapterConfig, module: str, rank: int) -> float:
    return config.scale(module)


# AdaLoRA, arXiv:2303.10512: B diag(E) A.
def _adalora(pieces: Mapping[str, Tensor], shape: Shape, scale: float) -> Product:
    return pieces["lora_B"] * scale, pieces["lora_A"] * pieces["lora_E"].reshape(-1, 1)


def _adalora_scale(config: AdapterConfig, module: str, rank: int) -> float:
    """PEFT divides by the first rank, also after ranks were taken away."""
    return (config.alpha if config.alpha > 0 else rank) / (config.rank + 1e-5)


# LoHa, arXiv:2108.06098: (W1a W1b) * (W2a W2b), the sum over i and j of columns and rows that are multiplied.
def _loha(pieces: Mapping[str, Tensor], shape: Shape, scale: float) -> Product:
    first = pieces["hada_w1_a"], pieces["hada_w1_b"]
    second = pieces["hada_w2_a"], pieces["hada_w2_b"]
    if _loha_rank({name: tuple(piece.shape) for name, piece in pieces.items()}, shape) < len(first[1]) ** 2:
        return _of_dense(first[0] @ first[1] * (second[0] @ second[1]) * scale)
    left = torch.einsum("or,os->ors", first[0], second[0]).flatten(1)
    right = torch.einsum("ri,si->rsi", first[1], second[1]).flatten(0, 1)
    return left * scale, right


def _loha_rank(shapes: Mapping[str, Shape], shape: Shape) -> int:
    return min(shapes["hada_w1_b"][0] * shapes["hada_w2_b"][0], *shape)


# LoKr, LyCORIS arXiv:2309.14859: kron(W1, W2), with kron(P Q, U V) = kron(P, U) kron(Q, V).
def _lokr(pieces: Mapping[str, Tensor], shape: Shape, scale: float) -> Product:
    first = _either(pieces, "lokr_w1")
    second = _either(pieces, "lokr_w2")
    return torch.kron(first[0], second[0]) * scale, torch.kron(first[1], second[1])


def _either(pieces: Mapping[str, Tensor], name: str) -> Product:
    """Factors of a matrix that is stored whole or as two factors, of the smallest rank without an SVD."""
    if name not in pieces:
        left = pieces[f"{name}_a"]
        right = pieces[f"{name}_b"]
        return (left, right) if len(right) < min(len(left), right.shape[1]) else _of_dense(left @ right)
    return _of_dense(pieces[name])


def _of_dense(matrix: Tensor) -> Product:
    """The matrix itself and an identity."""
    rows, columns = matrix.shape
    return (torch.eye(rows), matrix) if rows <= columns else (matrix, torch.eye(columns))


def _lokr_part(shapes: Mapping[str, Shape], name: str) -> tuple[int, int, int]:
    """(rows, columns, rank) of one of the two matrices."""
    if name in shapes:
        rows, columns = shapes[name]
        return rows, columns, min(rows, columns)
    rows, rank = shapes[f"{name}_a"]
    columns = shapes[f"{name}_b"][1]
    return rows, columns, min(rank, rows, columns)


def _lokr_shape(shapes: Mapping[str, Shape]) -> Shape:
    first = _lokr_part(shapes, "lokr_w1")
    second = _lokr_part(shapes, "lokr_w2")
    return first[0] * second[0], first[1] * second[1]


# VeRA, arXiv:2310.11454: diag(b) B diag(d) A, with B and A shared by all modules and cut to each.
def _vera(pieces: Mapping[str, Tensor], shape: Shape, scale: float) -> Product:
    left = pieces["vera_B"][: shape[0]] * pieces["vera_lambda_b"][:, None]
    return left, pieces["vera_A"][:, : shape[1]] * pieces["vera_lambda_d"][:, None]


# MiSS, arXiv:2409.15371: row j of the block is added to the columns j, j + R, j + 2 R, ... of the matrix.
def _miss(pieces: Mapping[str, Tensor], shape: Shape, scale: float) -> Product:
    block_RO = pieces["miss_block"]
    rank = len(block_RO)
    columns = torch.arange(shape[1]) % rank
    right = (columns[None, :] == torch.arange(rank)[:, None]).float()
    return block_RO.repeat(1, shape[0] // block_RO.shape[1]).T.contiguous(), right


TYPES: Mapping[str, AdapterType] = {
    "ADALORA": AdapterType(
        pieces=("lora_A", "lora_B", "lora_E"),
        required=("lora_A", "lora_B", "lora_E"),
        rank=lambda shapes, shape: shapes["lora_A"][0],
        factors=_adalora,
        shape=lambda shapes: (shapes["lora_B"][0], shapes["lora_A"][1]),
        scale=_adalora_scale,
        rank_key="init_r",
        alpha_key="lora_alpha",
    ),
    "LOHA": AdapterType(
        pieces=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        required=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        rank=_loha_rank,
        factors=_loha,
        shape=lambda shapes: (shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]),
        scale=_alpha_over_rank,
        alpha_key="alpha",
    ),
    "LOKR": AdapterType(
        pieces=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        required=(),
        rank=lambda shapes, shape: _lokr_part(shapes, "lokr_w1")[2] * _lokr_part(shapes, "lokr_w2")[2],
        factors=_lokr,
        shape=_lokr_shape,
        scale=_alpha_over_rank,
        alpha_key="alpha",
    ),
    "VERA": AdapterType(
        pieces=("vera_lambda_b", "vera_lambda_d"),
        required=("vera_lambda_b", "vera_lambda_d"),
        rank=lambda shapes, shape: shapes["vera_lambda_d"][0],
        factors=_vera,
        shared=("vera_A", "vera_B"),
    ),
    "MISS": AdapterType(
        pieces=("miss_block",),
        required=("miss_block",),
        rank=lambda shapes, shape: shapes["miss_block"][0],
        factors=_miss,
    ),
}
"""PEFT's peft_type -> how its adapters become LoRAs."""


def check_pieces(
    file: object, module: str, kind: AdapterType, shapes: Mapping[str, Shape], shape: Shape
) -> None:
    """Raise ArtifactError if a module's pieces do not fit each other, or make factors of an absurd size."""
    if absent := sorted(set(kind.required) - set(shapes)):
        raise ArtifactError(f"{file} has no {absent[0]} for {module}; restore the file")
    if any(0 in size for size in shapes.values()):
        raise ArtifactError(
            f"{file}: a tensor of {module} is empty, as DeepSpeed ZeRO-3 saves parameters that it did not "
            "gather; save the adapter again with gathered weights"
        )
    try:
        rank = kind.rank(shapes, shape)
        meta = {name: torch.empty(size, device="meta") for name, size in shapes.items()}
        fits = prod((rank, sum(shape))) <= _MOST_VALUES
        if fits:
            with torch.device("meta"):
                left, right = kind.factors(meta, shape, 1.0)
            fits = (tuple(left.shape), tuple(right.shape)) == ((shape[0], rank), (rank, shape[1]))
    except (KeyError, ValueError, IndexError, RuntimeError):
        fits = False
    if not fits:
        raise ArtifactError(
            f"{file}: the tensors of {module} have shapes that do not fit together or the matrix {shape}; "
            "restore the file, or give the base that it was made for"
        )
