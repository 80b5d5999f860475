"""Which token is chosen from logits."""

import math

import pytest
import torch

from svdconvert.config.chat import ChatOptions, chat_options
from svdconvert.conversation.sampling import Sampler, nucleus
from svdconvert.errors import ArtifactError, RecipeError

LOGITS = torch.tensor([0.3, 2.0, 1.0, -1.0, 1.9])


def test_temperature_0_takes_the_most_likely_token() -> None:
    assert Sampler(ChatOptions()).choose(LOGITS) == 1


def test_the_same_seed_draws_the_same_and_another_one_does_not() -> None:
    def drawn(seed: int) -> list[int]:
        sampler = Sampler(ChatOptions(temperature=1.0, seed=seed))
        return [sampler.choose(LOGITS) for _ in range(40)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature: float) -> None:
    sampler = Sampler(ChatOptions(temperature=temperature))
    count = 4000
    drawn = torch.bincount(torch.tensor([sampler.choose(LOGITS) for _ in range(count)]), minlength=5)
    weights = [math.exp(float(logit) / temperature) for logit in LOGITS]
    for number, weight in enumerate(weights):
        share = weight / sum(weights)
        error = math.sqrt(share * (1 - share) / count)
        assert abs(drawn[number] / count - share) < 5 * error


@pytest.mark.parametrize(
    ("share", "kept"), [(1.0, [0, 1, 2, 3]), (0.71, [1, 2, 3]), (0.7, [1, 3]), (0.41, [1, 3]), (0.01, [3])]
)
def test_the_nucleus_is_the_fewest_tokens_with_the_share(share: float, kept: list[int]) -> None:
    found = nucleus(torch.tensor([0.1, 0.3, 0.2, 0.4], dtype=torch.float64), share)
    assert found.nonzero().flatten().tolist() == kept


def test_a_model_that_computes_nan_is_refused() -> None:
    with pytest.raises(ArtifactError, match="NaN"):
        Sampler(ChatOptions()).choose(torch.tensor([0.0, float("nan")]))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"top_p": 0.5}, "`top_p` changes nothing at `temperature` 0"),
        ({"seed": 1}, "`seed` changes nothing at `temperature` 0"),
        ({"top_p": 0.0, "temperature": 1.0}, "`top_p` is 0.0"),
        ({"temperature": -1.0}, "`temperature` is -1.0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"template": "no place"}, "prompt"),
    ],
)
def test_options_without_effect_or_sense_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        chat_options(values)
