"""The options of `eval`."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Annotated

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from svdconvert.config.options import AutoFloat

_Rows = Annotated[int, Field(ge=1, le=10_000_000)]
_Batch = Annotated[int, Field(ge=1, le=65_536)]
_Tokens = Annotated[int, Field(ge=1, le=1_000_000)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class EvaluationOptions:
    """The options of `eval`. An invalid value raises pydantic's ValidationError.

    The docstring of a field is also the help text of its command-line option.
    """

    data: str | None = None
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

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.regrade and (idle := next(self._given(), None)):
            raise ValueError(f"{idle} changes nothing with regrade, which asks no model; leave it out")
        return self

    def _given(self) -> Iterator[str]:
        """The options that are not at their defaults, without regrade."""
        for entry in fields(self):
            if entry.name not in _OF_GRADING and getattr(self, entry.name) != entry.default:
                yield entry.name


_OF_GRADING = ("regrade",)
"""The options that do not shape the answers."""
