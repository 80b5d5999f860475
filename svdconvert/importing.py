"""Importing torch for arithmetic alone."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

_PART = "torch._meta_registrations"
_TRIED = ("2.13.0+cpu",)
_BACKENDS = "TORCH_DEVICE_BACKEND_AUTOLOAD"


@contextmanager
def for_arithmetic() -> Iterator[None]:
    """Within it torch is imported without what it knows of tensors that have a shape and no numbers.

    That part is for compilers, and a fifth of the import. It is nobody's promise that torch does without it,
    so it is left out only of the builds that were tried, and without other makers' backends, which may want
    it. See docs/adr/0014. `whole_torch` fetches it.
    """
    if "torch" in sys.modules or _installed() not in _TRIED:
        yield
        return
    before = os.environ.get(_BACKENDS)
    os.environ[_BACKENDS] = "0"
    sys.modules[_PART] = ModuleType(_PART)
    try:
        yield
    finally:
        sys.modules.pop(_PART, None)
        if "torch" in sys.modules:
            vars(sys.modules["torch"]).pop(_PART.removeprefix("torch."), None)
        os.environ.pop(_BACKENDS)
        if before is not None:
            os.environ[_BACKENDS] = before


def whole_torch() -> None:
    """Import what `for_arithmetic` left out, for code that is not ours."""
    if "torch" in sys.modules:
        import_module(_PART)


def _installed() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""
