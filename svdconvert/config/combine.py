"""The options of `combine`, for adapters and for checkpoints."""

from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from svdconvert.config.options import AboveZero, AutoFloat, Weights, refuse_rivals
from svdconvert.config.sizes import SizeText
from svdconvert.errors import brief

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def _parse_values(value: Any) -> Any:
    """ "t=0.3,normalize=false" as a mapping from names to numbers and truth values."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",")]
    if any(not name.strip() or not text.strip() for name, _, text in pairs):
        raise ValueError("write it as NAME=VALUE,NAME=VALUE, with numbers, true or false")
    found = {name.strip(): _value(text.strip()) for name, _, text in pairs}
    if unknown := [name for name, one in found.items() if isinstance(one, str)]:
        raise ValueError(f"{unknown[0]} is {brief(found[unknown[0]])}, which is no number, true or false")
    return found


def _value(text: str) -> bool | float | str:
    """A truth value, a number, or a text that is neither, which is refused later."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        number = float(text)
    except ValueError:
        return text
    return number if isfinite(number) else text


Number = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CombineOptions:
    """The options of `combine`."""

    method: str | None = None
    """The merge method; see `svdconvert list merges`. Without it sum for adapters, linear for checkpoints."""
    weights: Weights | None = None
    """One factor for each input, separated by commas, such as 0.7,-0.4; without it all are 1."""
    density: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the entries that is kept, for the methods that remove some."""
    set: Annotated[Mapping[str, bool | Number] | None, BeforeValidator(_parse_values)] = None
    """Other parameters of the method, such as t=0.3 or lambda=0.8,normalize=false."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Truncate every matrix of a combined adapter to this rank; for the method low-rank, the changes."""
    tol: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Truncate every matrix to the smallest rank whose error is at most this share of its change's norm."""
    rank_budget: Annotated[int, Field(ge=1)] | None = None
    """Truncate to ranks whose sum is this, distributed so that the total error is smallest."""
    alpha: AboveZero | None = None
    """The lora_alpha of adapter files that do not state it, such as RWKV-PEFT's."""
    dtype: AutoFloat = "auto"
    """Element type of the result; auto is float32 for adapters, and that of the base for checkpoints."""
    seed: int = 0
    """Seed of the methods that draw random entries."""
    max_shard_size: SizeText = "5GB"
    """Largest size of a shard of a combined checkpoint, such as 5GB, 200MB or 4GiB."""

    @model_validator(mode="after")
    def _refuse_rivals(self) -> Self:
        refuse_rivals(self, ("rank", "tol", "rank_budget"))
        return self
