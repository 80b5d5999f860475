"""Peak memory is a few matrices, independent of the size of the model and of its shards."""

import json
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from tests import medium
from tests.process import finish, start

HIDDEN, WIDE = 2048, 5632
LARGEST = HIDDEN * WIDE * 4
SQUARE = HIDDEN * HIDDEN * 4
"""Bytes of the largest target in float32: of all, and of attn.q."""
IMPORT = [
    sys.executable,
    "-c",
    "import svdconvert.cli.app; from svdconvert.commands import decompose, merge, verify",
]
COMMANDS = ("decompose", "exact", "merge", "verify", "to-lora")
LONG = ("exact", "merge", "verify", "to-lora")

pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("models")
    shape = {"hidden": HIDDEN, "wide": WIDE, "vocabulary": 32000}
    small = medium.build(directory / "small", layers=2, **shape)
    large = medium.build(directory / "large", layers=6, **shape)
    for model in (small, large):
        finish(start("decompose", model, "-o", model.with_name(f"{model.name}-split"), "--rank", 16))
    return small, large


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=pytest.mark.sweep) if name in LONG else name for name in COMMANDS],
)
def test_memory_depends_on_the_largest_matrix_and_not_on_the_model(
    command: str, models: tuple[Path, Path], tmp_path: Path
) -> None:
    bare = _peak([], program=IMPORT)
    small, large = (
        max(_peak(_command(command, model, tmp_path / f"{model.name}-{run}")) for run in range(2))
        for model in models
    )
    bound = 11 * SQUARE if command == "exact" else 6 * LARGEST
    assert large - bare <= bound, f"{(large - bare) / 1e6:.0f} MB instead of at most {bound / 1e6:.0f}"
    # A model three times as large must not need the memory of one matrix more. The peaks vary by a few per
    # cent with the timing of reading, computing and writing.
    assert large - small < LARGEST, f"{large / small:.3f} times the memory"


EXPERT = 1024 * 1024 * 4
"""Bytes of one expert in float32."""


def _stacked(directory: Path, experts: int) -> Path:
    """A checkpoint whose only matrices are the experts of a layer in two tensors, and its decomposition."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    path = "model.layers.0.mlp.experts"
    tensors = {
        f"{path}.gate_up_proj": torch.randn(experts, 1024, 1024),
        f"{path}.down_proj": torch.randn(experts, 1024, 512),
    }
    save_file(tensors, directory / "model.safetensors")
    split = directory.with_name(f"{directory.name}-split")
    finish(start("decompose", directory, "-o", split, "--rank", 4, "--tol", 0.1))
    return directory


@pytest.mark.parametrize(
    "command",
    ["decompose", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("merge", "verify", "to-lora"))],
)
def test_memory_does_not_depend_on_the_number_of_stacked_experts(command: str, tmp_path: Path) -> None:
    few, many = (_stacked(tmp_path / f"{experts}", experts) for experts in (6, 40))
    peaks = [_peak([*_command(command, model, tmp_path / f"out-{model.name}")]) for model in (few, many)]
    assert peaks[1] - peaks[0] < 4 * EXPERT, f"{(peaks[1] - peaks[0]) / 1e6:.0f} MB more for 34 experts more"


def _command(command: str, model: Path, out: Path) -> list[object]:
    split = model.with_name(f"{model.name}-split")
    return {
        "decompose": ["decompose", model, "-o", out, "--rank", 16],
        "exact": ["decompose", model, "-o", out, "--rank", 16, "--svd", "exact", "--targets", "attn.q"],
        "merge": ["merge", split, "-o", out],
        "verify": ["verify", split],
        "to-lora": ["to-lora", split, "-o", out],
    }[command]


def _peak(command: list[object], program: list[str] | None = None) -> int:
    """Largest anonymous memory of a process and its children in bytes, read every few milliseconds."""
    process = start(*command, program=program)
    watched = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(_anonymous(child.pid) for child in [watched, *watched.children(recursive=True)]))
        time.sleep(0.003)
    _, said = process.communicate()
    assert process.returncode == 0, said
    return peak


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
