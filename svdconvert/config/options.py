"""Every option that shapes a result, once: the command line, recipes and Python calls are made from it.

The text under a field is its help. This file imports no torch, so that `--help` is instant.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import Self

Float = Literal["float32", "bfloat16", "float16"]
AutoFloat = Literal["auto", "float32", "bfloat16", "float16"]
_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def _commas(value: Any) -> Any:
    parts = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value
    if not parts or "" in parts:
        raise ValueError("a target is empty; give all-linear, roles or globs")
    return parts


def _pairs(value: Any) -> Any:
    """ "attn=16,mlp.down=64" as a mapping."""
    if not isinstance(value, str):
        return value
    pairs = [part.rpartition("=") for part in value.split(",")]
    if any(not name.strip() for name, _, _ in pairs):
        raise ValueError("write it as TARGET=NUMBER,TARGET=NUMBER, with roles or globs for TARGET")
    return {name.strip(): number.strip() for name, _, number in pairs}


Names = Annotated[tuple[str, ...], BeforeValidator(_commas)]
Rank = Annotated[int, Field(ge=1)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SplitOptions:
    """The options of `decompose`."""

    method: str = "pissa"
    """A method; see `svdconvert list methods`."""
    init: str | None = None
    """How the method starts, where it knows several ways (lora-fa: svd or random)."""
    rank: Rank = 64
    """Rank of every adapter matrix."""
    alpha: AboveZero | None = None
    """The adapter is scaled by alpha / rank; alpha is the rank itself unless given."""
    rank_pattern: Annotated[Mapping[str, Rank] | None, BeforeValidator(_pairs)] = None
    """Other ranks for roles or globs, as attn=16,mlp.down=64; the last that fits holds."""
    alpha_pattern: Annotated[Mapping[str, AboveZero] | None, BeforeValidator(_pairs)] = None
    """Other alphas for roles or globs, likewise."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) in place of alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapter in training, for adapter_config.json."""
    targets: Names = ("all-linear",)
    """What is decomposed: all-linear, roles (attn, mlp, attn.q), globs on tensor names; by commas."""
    svd: Literal["fast", "exact", "exact64"] = "fast"
    """fast is randomised with a measured error, exact is LAPACK's full SVD in float32, exact64 in float64."""
    tol: AboveZero = 1e-3
    """How far the residual's norm may lie above the optimum, relatively, before LAPACK takes over."""
    dtype: Float = "float32"
    """In which the factors are stored."""
    residual_dtype: AutoFloat = "auto"
    """In which the residual is stored; auto is the source's own, and float32 for milora's minor slice."""
    max_shard_size: str = "5GB"
    """Size of an output shard, as 5GB, 200MB or 4GiB."""
    copy_base: bool = False
    """Write the base too where the method leaves it as it is."""
    layout: str | None = None
    """A layout, where config.json's model_type does not say; see `svdconvert list layouts`."""
    seed: int = 0
    """Of the random numbers."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MergeOptions:
    """The options of `merge`."""

    side: Literal["auto", "base", "residual"] = "auto"
    """From which weights; auto is the base where it is given or found, else the residual."""
    dtype: AutoFloat = "auto"
    """Of the merged matrices; auto is the base's own."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """stochastic keeps on average what is smaller than the last place of a half-precision number."""
    seed: int = 0
    """Of stochastic rounding."""
    max_shard_size: str = "5GB"
    """Size of an output shard, as 5GB, 200MB or 4GiB."""
    alpha: AboveZero | None = None
    """The lora_alpha of an adapter file that does not say it, as RWKV-PEFT's."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ConvertOptions:
    """The options of `convert`."""

    layout: str
    """The layout to write: blinkdl, hf, fla or web-rwkv for an RWKV-6; see `svdconvert list layouts`."""
    dtype: AutoFloat = "auto"
    """Of all tensors; auto leaves each as it is, and the conversion without loss."""
    state: bool = False
    """Give every layer of an RWKV a first state, at zero, to be tuned; blinkdl and web-rwkv have a place."""
    max_shard_size: str = "5GB"
    """Size of an output shard, as 5GB, 200MB or 4GiB; a .pth or .st is one file in any case."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LoraOptions:
    """The options of `to-lora`."""

    format: Literal["peft", "rwkv-peft"] = "peft"
    """Whose format: PEFT's, or the .pth that RWKV-PEFT trains and merges, at lora_alpha = rank."""
    dtype: Float = "float32"
    """In which the factors are stored."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Truncate every matrix to this rank, with the least error; without it the LoRA is exact."""
    tol: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Truncate every matrix to the least rank that leaves out at most this share of its change's norm."""
    rank_budget: Annotated[int, Field(ge=1)] | None = None
    """Truncate to ranks that add up to this, shared out so that the least is left out over all matrices."""

    alpha: AboveZero | None = None
    """The lora_alpha of an adapter file that does not say it, as RWKV-PEFT's."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        given = [name for name in ("rank", "tol", "rank_budget") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: give one")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PushOptions:
    """How a directory is published."""

    private: bool = False
    """Create the repository as a private one; one that exists stays as it is."""
    revision: str | None = None
    """Push to this branch, which is created where it is not there; main unless given."""
    message: str | None = None
    """The commit's message."""
    pull_request: bool = False
    """Open a pull request with it."""
