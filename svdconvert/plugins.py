"""Plug-ins, found by file name or entry point: adding one needs no list to be edited."""

from collections.abc import Collection
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from typing import Generic, TypeVar

from svdconvert.errors import PluginError, UnknownNameError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """The plug-ins of one kind: the modules of `package`, and the entry points of the group of that name.

    A module holds its plug-in in the variable `attribute`, and its file name is the plug-in's name:
    `lora_fa.py` is `lora-fa`. An entry point is named like its plug-in and refers to the object itself
    (`my_package.my_module:METHOD`). A plug-in is imported when it is asked for.
    """

    def __init__(
        self, package: str, attribute: str, kind: type[T], shared: Collection[str] = ("base",)
    ) -> None:
        """`kind` is the plug-ins' class; the modules in `shared` are no plug-ins."""
        self._package = package
        self._attribute = attribute
        self._kind = kind
        self._shared = shared

    @property
    def _noun(self) -> str:
        return self._attribute.lower()

    @cached_property
    def _files(self) -> dict[str, str]:
        folder = import_module(self._package).__path__
        names = [module.name for module in iter_modules(folder) if module.name not in self._shared]
        return {name.replace("_", "-"): name for name in names}

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        """Those of other packages. A file of svdconvert wins over an entry point of the same name."""
        found = entry_points(group=self._package)
        return {point.name: point for point in found if point.name not in self._files}

    def names(self) -> list[str]:
        """All known names, sorted. Nothing is imported."""
        return sorted({*self._files, *self._entry_points})

    def get(self, name: str) -> T:
        """The plug-in called `name`.

        Raises UnknownNameError, which suggests the nearest name, if there is none, and PluginError if
        another package's plug-in cannot be loaded.
        """
        if name in self._files:
            plugin = getattr(import_module(f"{self._package}.{self._files[name]}"), self._attribute)
            assert isinstance(plugin, self._kind), f"{self._package}.{self._files[name]} has no {self._noun}"
            return plugin
        if name in self._entry_points:
            return self._load(self._entry_points[name])
        raise UnknownNameError(f"there is no {self._noun} {name!r}; {did_you_mean(name, self.names())}")

    def _load(self, point: EntryPoint) -> T:
        package = point.dist.name if point.dist else "another package"
        try:
            plugin = point.load()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise PluginError(
                f"the {self._noun} {point.name} of {package} cannot be loaded from {point.value} ({reason}); "
                "repair, update or uninstall that package"
            ) from error
        if not isinstance(plugin, self._kind):
            raise PluginError(
                f"the {self._noun} {point.name} of {package} is {point.value}, a {type(plugin).__name__} and "
                f"no {self._kind.__name__}; its entry point must name the object, as in "
                f"my_package.my_module:{self._attribute}"
            )
        return plugin

    def load_all(self) -> tuple[dict[str, T], list[PluginError]]:
        """The plug-ins that can be loaded, by name, and what is wrong with the others.

        A defect in one package must not keep all the others from being used.
        """
        loaded: dict[str, T] = {}
        failed: list[PluginError] = []
        for name in self.names():
            try:
                loaded[name] = self.get(name)
            except PluginError as error:
                failed.append(error)
        return loaded, failed
