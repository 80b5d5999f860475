"""Versions of the program and of the packages that it needs, without importing any of them."""

import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal

from svdconvert.diagnosis.facts import Fact
from svdconvert.version import __version__

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[^]]*\])?\s*>=\s*(?P<least>[\d.]+)")
_EXTRA = re.compile(r"extra == ['\"](?P<extra>\w+)['\"]")
_NOT_FOR_USERS = ("all", "dev", "docs")
# What most reports of faults depend on, although others need it for us.
_INDIRECT = ("safetensors", "tokenizers", "hf-xet", "pydantic_core")
_OLDEST_PYTHON = (3, 10)


def program_facts() -> Iterator[Fact]:
    """The program, Python and the system."""
    yield Fact("program", "svdconvert", __version__)
    enough = sys.version_info >= _OLDEST_PYTHON
    python = f"{platform.python_implementation()} {platform.python_version()}"
    yield Fact("program", "Python", python if enough else f"{python}, 3.10 is needed", _state(enough))
    yield Fact("program", "system", platform.platform())


def _state(is_met: bool) -> Literal["ok", "missing"]:
    return "ok" if is_met else "missing"


def package_facts() -> Iterator[Fact]:
    """Every required package with its version, then those that they need, then the extras."""
    required = {name: least for extra, name, least in _requirements() if extra is None}
    if not required:
        yield Fact("packages", "requirements", "unknown, because svdconvert is not installed by pip", "note")
    for name, least in required.items():
        yield _required(name, least)
    for name in _INDIRECT:
        if (found := installed(name)) is not None:
            yield Fact("packages", name, found)
    yield from _extra_facts()


def _required(name: str, least: str) -> Fact:
    found = installed(name)
    if found is None:
        return Fact("packages", name, f'not installed: pip install "{name}>={least}"', "missing")
    if not is_at_least(found, least):
        return Fact("packages", name, f'{found} is too old: pip install "{name}>={least}"', "missing")
    return Fact("packages", name, f"{found} (at least {least})")


def _extra_facts() -> Iterator[Fact]:
    """Which extras are complete, and how the others are installed."""
    members: dict[str, list[tuple[str, str]]] = {}
    for extra, name, least in _requirements():
        if extra is not None and extra not in _NOT_FOR_USERS:
            members.setdefault(extra, []).append((name, least))
    for extra, packages in members.items():
        known = {name: installed(name) for name, _ in packages}
        lacking = [name for name, least in packages if not is_at_least(known[name] or "0", least)]
        if lacking:
            value = f'{", ".join(lacking)} not installed or too old: pip install "svdconvert[{extra}]"'
            yield Fact("extras", extra, value, "note")
        else:
            yield Fact("extras", extra, ", ".join(f"{name} {found}" for name, found in known.items()))


def _requirements() -> Iterator[tuple[str | None, str, str]]:
    """(extra or None, package, lowest version) as the installed program says."""
    try:
        lines = requires("svdconvert") or []
    except PackageNotFoundError:
        return
    for line in lines:
        if match := _REQUIREMENT.match(line):
            extra = _EXTRA.search(line)
            yield (extra["extra"] if extra else None), match["name"], match["least"]


def installed(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def is_at_least(found: str, least: str) -> bool:
    """Compare the numbers of two versions: 2.13.0+cpu is at least 2.6."""
    return _numbers(found) >= _numbers(least)


def _numbers(text: str) -> tuple[int, ...]:
    found = [int(number) for number in re.findall(r"\d+", text.partition("+")[0])[:4]]
    return (*found, *(0,) * (4 - len(found)))
