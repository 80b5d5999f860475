"""What the journal of an unfinished output knows: the command that continues it, and how far it came."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdconvert.config.counts import counted
from svdconvert.config.options import SplitOptions
from svdconvert.config.recipe import SECTIONS, to_cli_args
from svdconvert.errors import SvdConvertError
from svdconvert.manifest.schema import PLAIN, has_manifest, read_manifest
from svdconvert.methods.base import METHODS
from svdconvert.output.journal import journals, read_journal

_CHECKPOINT = re.compile(r"step-(\d{1,15})\.pt")
_WITH_A_MODEL = ("decompose", "convert")
_WITH_AN_ADAPTER = ("merge", "to-lora")


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An interrupted run."""

    verb: str
    version: str
    """The version of svdconvert that began it; another one does not continue it."""
    finished: str
    """How far it came."""
    command: str | None
    """The command that continues it; None if the journal does not have all of it."""


def read_unfinished(path: Path) -> Unfinished | None:
    """What is known of the staging directory `path`; None if its journal is of another form."""
    out = str(path).removesuffix(".partial")
    try:
        identity, records = read_journal(path / "journal.jsonl")
        count = len(records) + sum(len(read_journal(other)[1]) for other in journals(path)[1:])
        verb = str(identity["verb"])
        words = _inputs(verb, identity)
        section = verb.replace("-", "_")
        if words is not None and section in SECTIONS:
            words += to_cli_args(section, _chosen(verb, identity))
        version = str(identity["svdconvert"])
        finished = _steps(path, identity) if verb == "train" else counted(count, "finished tensor")
    except (OSError, SvdConvertError, KeyError, TypeError, ValueError, AttributeError):
        return None
    command = None if words is None else shlex.join(["svdconvert", verb, *words, "-o", out])
    return Unfinished(verb, version, finished, command)


def _inputs(verb: str, identity: Mapping[str, Any]) -> list[str] | None:
    """What the command was given besides its options; None if the journal does not say."""
    if verb in _WITH_A_MODEL:
        return [_location(identity["model"])]
    if verb in _WITH_AN_ADAPTER:
        return [_location(identity["adapter"]), *_other_weights(identity)]
    if verb == "train":
        start = next(iter(identity["start"]["files"]))
        return [start, *_split(Path(start), identity["split"])]
    return None  # combine and extract have several inputs, which their journals describe and do not name


def _location(origin: Mapping[str, Any]) -> str:
    revision = origin.get("revision")
    return f"{origin['location']}@{revision}" if revision else str(origin["location"])


def _other_weights(identity: Mapping[str, Any]) -> list[str]:
    """--base or --residual, if the adapter's manifest has them at another location, or not at all."""
    weights = identity.get("weights")
    if weights is None:
        return []
    side = str(identity["from"])
    adapter = Path(str(identity["adapter"]["location"]))
    manifest = read_manifest(adapter) if has_manifest(adapter) else None
    known = getattr(manifest, side, None)
    if (known is not None and known.location == weights["location"]) or weights["location"] == str(adapter):
        return []
    return [f"--{side}", _location(weights)]


def _split(start: Path, split: Mapping[str, Any]) -> list[str]:
    """How a plain model was decomposed; empty for a directory of decompose."""
    if has_manifest(start) and read_manifest(start).kind not in PLAIN:
        return []
    usual = SplitOptions()
    return [
        word
        for name in ("method", "rank")
        if split[name] != getattr(usual, name)
        for word in (f"--{name}", str(split[name]))
    ]


def _chosen(verb: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The options, without those of train that the method decides and that were not given."""
    options = dict(identity["options"])
    if verb != "train":
        return options
    start = Path(next(iter(identity["start"]["files"])))
    of_directory = has_manifest(start) and read_manifest(start).kind not in PLAIN
    method = METHODS.get(read_manifest(start).method if of_directory else identity["split"]["method"])
    for name, usual in (("lr", method.learning_rate), ("penalty", method.penalty)):
        if options.get(name) == usual:
            options.pop(name)
    return options


def _steps(path: Path, identity: Mapping[str, Any]) -> str:
    """The step of the newest checkpoint."""
    names = [_CHECKPOINT.fullmatch(file.name) for file in (path / "checkpoints").glob("step-*.pt")]
    newest = max((int(match[1]) for match in names if match), default=0)
    total = identity["options"].get("steps")
    return (
        f"{newest:,}{f' of {total:,}' if isinstance(total, int) else ''} steps, up to the newest checkpoint"
    )
