"""Plug-ins by file name or entry point: the file's name is the registration."""

from collections.abc import Collection
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from typing import Generic, TypeVar, cast

from svdconvert.errors import UnknownNameError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """The modules of `package`, and the entry points of the group of the same name.

    Each module holds its plug-in under `attribute`. A plug-in is imported when asked for, never
    before. `lora_fa.py` answers to `lora-fa`. The modules in `shared` are no plug-ins.
    """

    def __init__(self, package: str, attribute: str, noun: str, shared: Collection[str] = ("base",)) -> None:
        self._package, self._attribute, self._noun = package, attribute, noun
        self._shared = shared

    @cached_property
    def _files(self) -> dict[str, str]:
        folder = import_module(self._package).__path__
        names = [module.name for module in iter_modules(folder) if module.name not in self._shared]
        return {name.replace("_", "-"): name for name in names}

    @cached_property
    def _foreign(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self._package)}

    def names(self) -> list[str]:
        """All known names, sorted."""
        return sorted({*self._files, *self._foreign})

    def get(self, name: str) -> T:
        """The plug-in called `name`. Raises UnknownNameError with the nearest known name."""
        if name in self._files:
            module = import_module(f"{self._package}.{self._files[name]}")
            return cast(T, getattr(module, self._attribute))
        if name in self._foreign:
            return cast(T, self._foreign[name].load())
        raise UnknownNameError(f"there is no {self._noun} {name!r}; {did_you_mean(name, self.names())}")
