"""A options refuses what it cannot mean, and counts its steps."""

import pytest
from pydantic import ValidationError

from svdconvert.config.train import TrainOptions


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"steps": 0}, "steps"),
        ({"epochs": -1.0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_length": 1}, "max_length"),
        ({"warmup": 1.0}, "warmup"),
        ({"clip": -1.0}, "clip"),
        ({"dropout": 1.0}, "dropout"),
        ({"precision": "fp8"}, "precision"),
        ({"schedule": "step"}, "schedule"),
        ({"seed": -1}, "seed"),
        ({"learning_rate": 1e-4}, "learning_rate"),
    ],
)
def test_an_invalid_or_unknown_option_is_named(options: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError) as raised:
        TrainOptions(**options)  # type: ignore[arg-type]
    assert [error["loc"] for error in raised.value.errors()] == [(field,)]


def test_steps_and_epochs_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="`steps` and `epochs` exclude each other"):
        TrainOptions(steps=1, epochs=1.0)


def test_one_field_without_the_other_is_refused() -> None:
    with pytest.raises(ValidationError, match="`prompt_field` and `response_field` belong together"):
        TrainOptions(prompt_field="a")


def test_every_option_has_a_help_text() -> None:
    fields = TrainOptions.__pydantic_fields__  # type: ignore[attr-defined]
    assert [name for name, field in fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("options", "rows", "processes", "steps"),
    [
        ({}, 9, 1, 3),
        ({"accumulate": 2}, 9, 1, 2),
        ({}, 9, 2, 2),
        ({"epochs": 2.0}, 9, 1, 6),
        ({"epochs": 0.5}, 100, 1, 13),
        ({"steps": 7}, 9, 1, 7),
    ],
)
def test_the_last_step_of_an_epoch_may_be_a_smaller_one(
    options: dict[str, object], rows: int, processes: int, steps: int
) -> None:
    assert TrainOptions(**options).total_steps(rows, processes) == steps  # type: ignore[arg-type]


def test_the_default_learning_rate_does_not_replace_a_given_one() -> None:
    assert TrainOptions().with_default_lr(2e-5).lr == 2e-5
    assert TrainOptions(lr=1e-3).with_default_lr(2e-5).lr == 1e-3


@pytest.mark.parametrize("options", [{"patience": 2}, {"keep_best": True}, {"samples": 1}], ids=str)
def test_options_about_held_out_rows_need_such_rows(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="need held-out rows: give `eval_rows` or `eval_data`"):
        TrainOptions(**options)  # type: ignore[arg-type]
    assert TrainOptions(**options, eval_rows=1).eval_rows == 1  # type: ignore[arg-type]
