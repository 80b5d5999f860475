"""The options of `eval`."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from svdconvert.config.options import AutoFloat
from svdconvert.errors import RecipeError, brief


def _one(value: Any) -> Any:
    """A list of one name as that name: the command line accepts an option called data several times."""
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise ValueError("a task has one data set; give it once")
        return value[0]
    return value


_Rows = Annotated[int, Field(ge=1, le=10_000_000)]
_Batch = Annotated[int, Field(ge=1, le=65_536)]
_Tokens = Annotated[int, Field(ge=1, le=1_000_000)]


@dataclass(
    frozen=True,
    kw_only=True,
    config=ConfigDict(extra="forbid", use_attribute_docstrings=True),
)
class EvaluationOptions:
    """The options of `eval`. An invalid value raises pydantic's ValidationError.

    The docstring of a field is also the help text of its command-line option.
    """

    data: Annotated[str | None, BeforeValidator(_one)] = None
    """The task's rows, with the fields of its data set: a file as for train, or a Hub data set ORG/NAME."""
    limit: _Rows | None = None
    """Ask the first N rows only."""
    batch_size: _Batch | None = None
    """Rows that are answered together; by default as many as keep the cache within 4 GB, at most 64."""
    dtype: AutoFloat = "auto"
    """Element type in which the model computes; auto is that of its files."""
    max_new_tokens: _Tokens | None = None
    """Largest number of tokens of an answer; by default the task's, which is that of its paper."""
    regrade: bool = False
    """Grade the stored answers again, without a model."""
    run_code: bool = False
    """Run the programs that the model writes, which tasks of code need for their grades."""
    sandbox: Literal["auto", "none"] = "auto"
    """What confines these programs: what the system has, or with none limits of time and memory alone."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.sandbox != "auto" and not self.run_code:
            raise ValueError("`sandbox` changes nothing without `run_code`; leave it out")
        if self.regrade and (idle := next(self._given(), None)):
            raise ValueError(f"`{idle}` changes nothing with `regrade`, which asks no model; leave it out")
        return self

    def _given(self) -> Iterator[str]:
        """The options that shape the answers and are not at their defaults."""
        for entry in fields(self):
            if entry.name not in _OF_GRADING and getattr(self, entry.name) != entry.default:
                yield entry.name


_OF_GRADING = ("regrade", "run_code", "sandbox")
"""The options that do not shape the answers."""


def evaluation_options(values: Mapping[str, Any]) -> EvaluationOptions:
    """The options with these values. Raises RecipeError for one that is out of range or of the wrong type."""
    try:
        return EvaluationOptions(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        message = first["msg"].removeprefix("Value error, ").replace("Input should", "it should", 1)
        wrong = f"{key} is {brief(first['input'])}: {message}" if key else message
        raise RecipeError(f"eval: {wrong}") from None
