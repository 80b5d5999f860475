"""The progress of loading weights with transformers, in place of its own bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from svdconvert.config.progress import report
from svdconvert.hub.transfers import hub_bars_restored


@contextmanager
def loading_reported() -> Iterator[None]:
    """Report what transformers would draw bars for; its own setting of the bars is left as it is."""
    from transformers.utils import logging

    transformers_logging: Any = logging
    if not hasattr(transformers_logging, "set_tqdm_hook"):  # added to transformers after 5.0
        with _bars_disabled(transformers_logging):
            yield
        return
    before = transformers_logging.set_tqdm_hook(_counter)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)


@contextmanager
def _bars_disabled(transformers_logging: Any) -> Iterator[None]:
    """Without bars of transformers; with them it disables and enables those of huggingface_hub."""
    with hub_bars_restored():
        were_enabled = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            if were_enabled:
                transformers_logging.enable_progress_bar()


def _counter(factory: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> "_Counter":
    return _Counter(*args, **named)


class _Counter:
    """Counts like a bar of tqdm, and draws nothing."""

    def __init__(self, iterable: Any = None, *_: Any, total: int | None = None, **__: Any) -> None:
        self._items = iterable
        self.n = 0
        self.total = total if total is not None or iterable is None else len(iterable)
        self.update(0)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items or ():
            yield item
            self.update(1)

    def update(self, count: float | None = 1) -> None:
        """Report `count` more weights."""
        self.n += int(count or 0)
        report("load weights", self.n, self.total, "tensors")

    def __enter__(self) -> "_Counter":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Everything else that a bar can do changes only what is drawn."""
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **named: None
