"""Options of eval that others make ineffective are refused, and named as they are typed."""

import pytest
from pydantic import ValidationError

from svdconvert.config.evaluation import EvaluationOptions
from tests.program import refused


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"sandbox": "none"}, "`sandbox` changes nothing without `run_code`"),
        ({"regrade": True, "limit": 3}, "`limit` changes nothing with `regrade`"),
    ],
    ids=str,
)
def test_an_option_without_effect_is_refused(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        EvaluationOptions(**values)  # type: ignore[arg-type]


def test_the_command_line_names_it_as_it_is_typed(tmp_path: object) -> None:
    words = ("eval", tmp_path, "--tasks", "gsm8k", "--sandbox", "none")
    refused(*words, words=["--sandbox changes nothing without --run-code"])
