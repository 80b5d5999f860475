"""mergekit as another process, if it is installed: `MERGEKIT` names its program mergekit-yaml."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

PROGRAM = os.environ.get("MERGEKIT") or shutil.which("mergekit-yaml")


def run_mergekit(config: Mapping[str, Any], out: Path, *options: str) -> Path:
    """Merge as a file says, on the CPU; returns the directory of the result."""
    assert PROGRAM is not None
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(dict(config)))
    words = [PROGRAM, str(file), str(out), "--no-copy-tokenizer", *options]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out
