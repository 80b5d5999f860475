"""The settings of a model while it is trained or evaluated: dropout, cache and gradient checkpointing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from svdconvert.errors import RecipeError
from svdconvert.training.compat import remove_accelerate_wrappers
from svdconvert.training.model.adapted_linear import AdaptedLinear
from svdconvert.training.model.expert_branch import ExpertBranch


@contextmanager
def training_mode(model: nn.Module, *, gradient_checkpointing: bool = False) -> Iterator[None]:
    """Dropout in the adapters only, and no key-value cache; all settings are restored afterwards.

    Raises RecipeError for `gradient_checkpointing` of a model that does not support it.
    """
    modes = [(module, module.training) for module in model.modules()]
    # The language model of a multimodal model has a separate configuration.
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    use_cache = getattr(config, "use_cache", None)
    # Not model.train(), which would enable the model's own dropout.
    model.eval()
    if gradient_checkpointing:
        _enable_checkpointing(model)
    _switch(model, training=True)
    if use_cache is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if use_cache is not None:
            config.use_cache = use_cache
        if gradient_checkpointing:
            _checkpointing_method(model, "disable")()
        for module, training in modes:
            module.training = training
        remove_accelerate_wrappers(model)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within `training_mode`: no dropout in the adapters, and no gradient checkpointing."""
    _switch(model, training=False)
    try:
        yield
    finally:
        _switch(model, training=True)


def _switch(model: nn.Module, *, training: bool) -> None:
    for module in model.modules():
        if isinstance(module, AdaptedLinear | ExpertBranch):
            module.dropout.train(training)
        elif getattr(module, "gradient_checkpointing", False):
            # transformers reads the flag of the block itself. The flags of its parts, and so their dropout,
            # stay off.
            module.training = training


def _enable_checkpointing(model: nn.Module) -> None:
    try:
        _checkpointing_method(model, "enable")({"use_reentrant": False})
    except (ValueError, AttributeError) as error:
        raise RecipeError(
            f"{type(model).__name__} does not support gradient checkpointing: "
            "train without `gradient_checkpointing`"
        ) from error


def _checkpointing_method(model: nn.Module, action: str) -> Any:
    """The method of transformers' models, under its current or its former name."""
    current = f"activation_checkpointing_{action}"
    former = f"gradient_checkpointing_{action}"
    return getattr(model, current if hasattr(model, current) else former)
