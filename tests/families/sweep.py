"""Check every family of transformers of which a tiny model can be made, and write docs/families.md.

python -m tests.families.sweep [--only NAME,NAME] [--kind causal] [--page docs/families.md]
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from transformers import logging
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.families.check import Family, examine
from tests.families.page import page

NAMES = {
    "causal": list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image-text": list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}


def sweep(only: set[str], kinds: list[str]) -> Iterator[Family]:
    """The findings on every family, one after the other."""
    with tempfile.TemporaryDirectory() as directory:
        for kind in kinds:
            for name in NAMES[kind]:
                if not only or name in only:
                    yield examine(name, kind, Path(directory))


def main() -> None:
    """Run the sweep: a line for each family, then the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--kind", choices=[*NAMES])
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    found: list[Family] = []
    kinds = [arguments.kind] if arguments.kind else [*NAMES]
    for family in sweep({*filter(None, arguments.only.split(","))}, kinds):
        found.append(family)
        print(json.dumps(asdict(family)), flush=True)
    if arguments.page:
        arguments.page.write_text(page(found))


if __name__ == "__main__":
    main()
