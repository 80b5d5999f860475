"""Check every family of transformers of which a tiny model can be made, and write docs/families.md.

python -m tests.families.sweep [--only NAME,NAME] [--kind causal] [--kept DIR] [--page docs/families.md]

With --kept, the findings on each family are kept in a file of that directory, and those of the same program,
tiny model and versions are not found again: the sweep may be stopped and continued, or done in parts. The
page is written from the findings on all families.
"""

import argparse
import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import logging
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.families.check import Family, examine
from tests.families.page import page
from tests.families.shrink import shrunk

NAMES = {
    "causal": list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image-text": list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}


PROGRAM = [
    *sorted(Path("svdconvert").rglob("*.py")),
    *(Path("tests") / name for name in ("families/check.py", "families/inputs.py", "stock.py", "tiny.py")),
]


def sweep(only: set[str], kinds: list[str], kept: Path | None) -> Iterator[Family]:
    """The findings on every family, one after the other."""
    program = hashlib.sha256(b"".join(path.read_bytes() for path in PROGRAM))
    program.update(repr([version(name) for name in ("transformers", "peft", "torch")]).encode())
    with tempfile.TemporaryDirectory() as directory:
        for kind in kinds:
            for name in NAMES[kind]:
                if not only or name in only:
                    yield _found(name, kind, Path(directory), kept, program.copy())


def _found(name: str, kind: str, directory: Path, kept: Path | None, program: Any) -> Family:
    """The findings on one family: those that are kept, if they are of the same program and tiny model."""
    if kept is None:
        return examine(name, kind, directory)
    try:
        program.update(json.dumps(shrunk(name).to_dict(), default=repr, sort_keys=True).encode())
    except Exception as error:
        program.update(repr(error).encode())
    path = kept / f"{kind}-{name}.json"
    if path.is_file():
        values = json.loads(path.read_text())
        if values.pop("of") == program.hexdigest():
            return Family(**values)
    family = examine(name, kind, directory)
    kept.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"of": program.hexdigest(), **asdict(family)}))
    return family


def main() -> None:
    """Run the sweep: a line for each family, then the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--kind", choices=[*NAMES])
    parser.add_argument("--kept", type=Path)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    if arguments.page and (arguments.only or arguments.kind):
        parser.error("--page is written from all families: leave --only and --kind out")
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    found: list[Family] = []
    kinds = [arguments.kind] if arguments.kind else [*NAMES]
    for family in sweep({*filter(None, arguments.only.split(","))}, kinds, arguments.kept):
        found.append(family)
        print(json.dumps(asdict(family)), flush=True)
    if arguments.page:
        arguments.page.write_text(page(found))


if __name__ == "__main__":
    main()
