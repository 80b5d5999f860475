"""The options that shape a result. The command line, recipes and Python calls use these classes.

The text under a field is its help. This module imports no torch, so that `--help` is fast.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from svdconvert.config.sizes import SizeText

Float = Literal["float32", "bfloat16", "float16"]
AutoFloat = Literal["auto", "float32", "bfloat16", "float16"]
Experts = Literal["fused", "each"]
_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def _split_at_commas(value: Any) -> Any:
    """ "attn,mlp" as a tuple of names."""
    parts = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        raise ValueError("it should be names, separated by commas or as a list")
    if not parts or "" in parts:
        raise ValueError("a target is empty; give all-linear, roles or globs")
    return parts


def _parse_pairs(value: Any) -> Any:
    """ "attn=16,mlp.down=64" as a mapping."""
    if not isinstance(value, str):
        return value
    pairs = [part.rpartition("=") for part in value.split(",")]
    if any(not name.strip() for name, _, _ in pairs):
        raise ValueError("write it as TARGET=NUMBER,TARGET=NUMBER, with roles or globs for TARGET")
    return {name.strip(): number.strip() for name, _, number in pairs}


def _split_numbers(value: Any) -> Any:
    """ "0.7,-0.4" as a tuple of numbers."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


Weight = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Weights = Annotated[tuple[Weight, ...], BeforeValidator(_split_numbers)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split_at_commas)]
Rank = Annotated[int, Field(ge=1)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SplitOptions:
    """The options of `decompose`."""

    method: str = "pissa"
    """The method; see `svdconvert list methods`."""
    init: str | None = None
    """The initialisation, for methods with several (lora-fa: svd or random)."""
    rank: Rank = 64
    """Rank of the adapter of every matrix."""
    alpha: AboveZero | None = None
    """The adapter is scaled by alpha / rank; without it, alpha is the rank."""
    rank_pattern: Annotated[Mapping[str, Rank] | None, BeforeValidator(_parse_pairs)] = None
    """Other ranks for roles or globs, such as attn=16,mlp.down=64; the last one that matches applies."""
    alpha_pattern: Annotated[Mapping[str, AboveZero] | None, BeforeValidator(_parse_pairs)] = None
    """Other alphas for roles or globs, in the same form."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input in training, for adapter_config.json."""
    targets: Names = ("all-linear",)
    """What is decomposed: all-linear, roles (attn, mlp.up), modules (q_proj) or globs on names, by commas."""
    svd: Literal["fast", "exact", "exact64"] = "fast"
    """fast is randomised with a measured error; exact is LAPACK's full SVD in float32, exact64 in float64."""
    tol: AboveZero = 1e-3
    """Largest relative excess of the residual's norm over the optimum; above it, LAPACK replaces fast."""
    dtype: Float = "float32"
    """Element type of the stored factors."""
    residual_dtype: AutoFloat = "auto"
    """Element type of the stored residual; auto is that of the source, and float32 for milora."""
    residual_format: Literal["plain", "nf4"] = "plain"
    """How the residual is stored: as plain numbers, or in 4 bits as bitsandbytes and transformers read it."""
    quant_start: Literal["best", "pissa", "loftq"] = "best"
    """First factors of the 4-bit alternation: the method's (pissa), none (loftq), or what ends up better."""
    quant_iterations: Annotated[int, Field(ge=1, le=100)] = 5
    """How often the 4-bit residual and the factors are fitted to each other in turn."""
    double_quant: bool = False
    """Quantise the scales of the 4-bit residual too: 4.13 instead of 4.5 bits per weight."""
    nuclear_ratio: Annotated[str, Field(pattern=r"^(all|[1-9][0-9]{0,5})$")] | None = None
    """Measure the nuclear-norm error ratio of a 4-bit residual too: all, or a number of matrices per role."""
    max_shard_size: SizeText = "5GB"
    """Largest size of an output shard, such as 5GB, 200MB or 4GiB."""
    copy_base: bool = False
    """Write the base too, for methods that do not change it."""
    experts: Experts = "fused"
    """How factors of experts are stored: fused for PEFT, or each expert's by itself for inference engines."""
    layout: str | None = None
    """The layout, if config.json's model_type does not tell it; see `svdconvert list layouts`."""
    seed: int = 0
    """Seed of the random numbers."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MergeOptions:
    """The options of `merge`."""

    side: Literal["auto", "base", "residual"] = "auto"
    """The weights to merge into; auto is the base if it is given or found, else the residual."""
    dtype: AutoFloat = "auto"
    """Element type of the merged matrices; auto is that of the base."""
    keep_format: bool = False
    """Write a quantised base in its own format again, instead of a plain checkpoint."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """stochastic keeps, on average, changes that are smaller than the spacing of half-precision numbers."""
    seed: int = 0
    """Seed of stochastic rounding."""
    max_shard_size: SizeText = "5GB"
    """Largest size of an output shard, such as 5GB, 200MB or 4GiB."""
    alpha: AboveZero | None = None
    """The lora_alpha of an adapter file that does not state it, such as RWKV-PEFT's."""
    weights: Weights | None = None
    """One factor for the change of each adapter, such as 0.7,-0.4; without it all are 1."""

    @model_validator(mode="after")
    def _refuse_rivals(self) -> Self:
        if self.keep_format and self.dtype != "auto":
            raise ValueError("`keep_format` and `dtype` exclude each other: give one")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ConvertOptions:
    """The options of `convert`."""

    layout: str
    """The layout to write: blinkdl, hf, fla or web-rwkv for an RWKV-6; see `svdconvert list layouts`."""
    dtype: AutoFloat = "auto"
    """Element type of all tensors; auto keeps that of each, so that nothing is lost."""
    state: bool = False
    """Add a state of zeros to every layer of an RWKV, for state tuning (blinkdl and web-rwkv only)."""
    max_shard_size: SizeText = "5GB"
    """Largest size of an output shard, such as 5GB, 200MB or 4GiB; a .pth or .st is never split."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LoraOptions:
    """The options of `to-lora`."""

    format: Literal["peft", "vllm", "mlx", "gguf", "rwkv-peft"] = "peft"
    """For PEFT, vLLM (no more than it loads), mlx-lm, llama.cpp (gguf) or RWKV-PEFT (a .pth)."""
    dtype: Float = "float32"
    """Element type of the stored factors."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Truncate every matrix to this rank, with the smallest possible error; without it the LoRA is exact."""
    tol: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Truncate every matrix to the smallest rank whose error is at most this share of its change's norm."""
    rank_budget: Annotated[int, Field(ge=1)] | None = None
    """Truncate to ranks whose sum is this, distributed so that the total error is smallest."""
    experts: Experts = "fused"
    """How factors of experts are stored: fused for PEFT, or each expert's by itself for inference engines."""
    alpha: AboveZero | None = None
    """The lora_alpha of an adapter file that does not state it, such as RWKV-PEFT's."""
    base_name: Annotated[str, Field(min_length=1)] | None = None
    """What the LoRA calls its base, such as org/name; by default its name on the Hub, if it has one."""

    @model_validator(mode="after")
    def _refuse_rivals(self) -> Self:
        refuse_rivals(self, ("rank", "tol", "rank_budget"))
        return self


def refuse_rivals(options: object, names: Sequence[str]) -> None:
    """Raise ValueError if more than one of these options is given."""
    given = [name for name in names if getattr(options, name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(f'`{name}`' for name in given)} exclude each other: give one")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PushOptions:
    """How a directory is published."""

    private: bool = False
    """Create the repository as private; an existing one is not changed."""
    revision: str | None = None
    """Push to this branch, which is created if it does not exist; without it, to main."""
    message: str | None = None
    """Message of the commit."""
    pull_request: bool = False
    """Open a pull request instead of committing to the branch."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ExtractOptions:
    """The options of `extract`."""

    rank: Rank | None = None
    """Rank of every matrix's factors; 64 if no rule for the ranks is given."""
    tol: Annotated[float, Field(gt=0, lt=1)] | None = None
    """For every matrix the smallest rank whose error is at most this share of its change's norm."""
    energy: Annotated[float, Field(gt=0, lt=1)] | None = None
    """For every matrix the smallest rank that holds this share of its change's squared norm, such as 0.9."""
    rank_budget: Rank | None = None
    """Ranks whose sum is this, distributed over the matrices so that the total error is smallest."""
    targets: Names = ("all-linear",)
    """What becomes factors: all-linear, roles (attn, mlp.up), modules (q_proj) or globs, by commas."""
    keep: Literal["changed", "none"] = "changed"
    """changed stores norms, biases, embeddings and heads that differ, in full; none leaves them out."""
    dtype: Float = "float32"
    """Element type of the stored factors."""
    layout: str | None = None
    """The layout, if config.json's model_type does not tell it; see `svdconvert list layouts`."""

    @model_validator(mode="after")
    def _refuse_rivals(self) -> Self:
        refuse_rivals(self, RANK_RULES)
        return self


RANK_RULES = ("rank", "tol", "energy", "rank_budget")
"""The options of `extract` of which one at most can be given."""
