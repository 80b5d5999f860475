"""The command that makes a directory like a given one, for its card."""

import shlex
from pathlib import Path

from svdconvert.config.recipe import section_of, to_cli_args
from svdconvert.manifest.schema import Manifest, Origin


def command_of(manifest: Manifest, repository: str) -> str:
    """What is typed to make such a directory and push it to `repository`."""
    section = section_of(manifest.kind, manifest.command)
    options = to_cli_args(section, manifest.options)
    words = ["svdconvert", section.replace("_", "-"), *_inputs(manifest), *options]
    return shlex.join([*words, "-o", repository.split("/")[-1], "--push", repository])


def _inputs(manifest: Manifest) -> list[str]:
    """The positional argument and, for an adapter started on a plain model, how it was started."""
    if manifest.command == "combine":
        return _combined(manifest)
    if manifest.command == "extract":
        return [_name(manifest.base, "BASE"), "TUNED"]
    if manifest.kind in ("decomposed", "converted"):
        return [_name(manifest.base, "MODEL")]
    if manifest.kind == "finetuned":
        return [_name(manifest.base, "MODEL"), "--method", manifest.method]
    if manifest.kind != "trained":
        return ["TRAINED"]
    if manifest.residual is not None:
        return [_name(manifest.residual, "DECOMPOSED")]
    rank = max((matrix.rank for matrix in manifest.matrices.values()), default=None)
    start = ["--method", manifest.method, *(["--rank", str(rank)] if rank else [])]
    return [_name(manifest.base, "MODEL"), *start]


def _combined(manifest: Manifest) -> list[str]:
    """The inputs of `combine`: adapters, or a file that says how checkpoints were merged."""
    if "file" in manifest.options:
        return ["--config", "MERGE.yaml"]
    base = ["--base", _name(manifest.base, "BASE")] if manifest.options.get("base") else []
    return [*(Path(str(name)).name for name in manifest.options.get("inputs", ())), *base]


def _name(origin: Origin | None, otherwise: str) -> str:
    if origin is None:
        return otherwise
    return f"{origin.location}@{origin.revision}" if origin.revision else Path(origin.location).name
