"""Importing torch for arithmetic alone."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

_PARTS = (
    "torch._meta_registrations",
    "torch.distributions",
    "torch.export",
    "torch.masked",
    "torch.quantization",
    "torch.utils.data",
)
"""What torch imports for others: for compilers, quantised models, random variables and data sets."""
_TRIED = ("2.13.0+cpu", "2.14.1+cu130")
_BACKENDS = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def import_for_arithmetic() -> None:
    """Import torch without `_PARTS`, which are a quarter to a third of the import.

    It is nobody's promise that torch does without them, so they are left out only of the builds that were
    tried, and without other makers' backends, which may want them. Who imports a part later gets it; what
    wants several of them, as PEFT does, wants `whole_torch` first. See docs/adr/0014.
    """
    tried = "torch" not in sys.modules and _installed() in _TRIED
    with ExitStack() as left_out:
        if tried:
            left_out.enter_context(_without_backends())
            left_out.enter_context(_without_parts())
        import_module("torch")


def whole_torch() -> None:
    """Import what `import_for_arithmetic` left out: for others' code, and for tensors without numbers."""
    if "torch" in sys.modules:
        for name in _PARTS:
            import_module(name)


@contextmanager
def _without_parts() -> Iterator[None]:
    empty = {name: ModuleType(name) for name in _PARTS}
    sys.modules.update(empty)
    try:
        yield
    finally:
        for name, module in empty.items():
            del sys.modules[name]
            package, _, own = name.rpartition(".")
            if package in sys.modules and vars(sys.modules[package]).get(own) is module:
                delattr(sys.modules[package], own)


@contextmanager
def _without_backends() -> Iterator[None]:
    before = os.environ.get(_BACKENDS)
    os.environ[_BACKENDS] = "0"
    try:
        yield
    finally:
        os.environ.pop(_BACKENDS)
        if before is not None:
            os.environ[_BACKENDS] = before


def _installed() -> str:
    """torch's version with the build, as 2.13.0+cpu: the package's own file says it, its metadata may not."""
    spec = find_spec("torch")
    stated = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if stated is None or not stated.is_file():
        return ""
    found = re.search(r"^__version__ = '(.+)'$", stated.read_text(), re.MULTILINE)
    return found[1] if found else ""
