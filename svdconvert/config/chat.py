"""The options of `chat`."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from svdconvert.config.first_fault import first_fault
from svdconvert.config.options import AutoFloat
from svdconvert.errors import RecipeError

CHAT = "chat"
NO_TEMPLATE = "none"


@dataclass(
    frozen=True,
    kw_only=True,
    config=ConfigDict(extra="forbid", use_attribute_docstrings=True),
)
class ChatOptions:
    """The options of `chat`. An invalid value raises pydantic's ValidationError.

    The docstring of a field is also the help text of its command-line option.
    """

    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Largest number of tokens of an answer."""
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0
    """0 takes the most likely token every time; 1 draws from the model's own distribution."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the most likely tokens only, as many as have this share of the probability."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of what is drawn."""
    template: str | None = None
    """How the model is asked: text with {prompt} in it, "chat" or "none"; by default as it was trained, else
    by the tokenizer's chat template."""
    dtype: AutoFloat = "auto"
    """Element type in which the model computes; auto is that of its files."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.temperature == 0:
            for name, value, usual in (("top_p", self.top_p, 1.0), ("seed", self.seed, 0)):
                if value != usual:
                    raise ValueError(
                        f"`{name}` changes nothing at `temperature` 0; give one above 0, or leave it out"
                    )
        if self.template not in (None, CHAT, NO_TEMPLATE) and "{prompt}" not in str(self.template):
            raise ValueError('`template` is a text with {prompt} in it, "chat" or "none"')
        return self


def chat_options(values: Mapping[str, Any]) -> ChatOptions:
    """The options with these values. Raises RecipeError for one that is out of range or of the wrong type."""
    try:
        return ChatOptions(**values)
    except ValidationError as error:
        raise RecipeError(f"chat: {first_fault(error)}") from None
