"""What a person sees in a terminal, from the first byte of a command to the last."""

import re
from pathlib import Path

import pytest
import torch

from svdconvert import Run, SplitOptions, decompose
from tests import medium
from tests.conftest import Build
from tests.loopback_hub.server import Hub
from tests.reading import readable, write_sums
from tests.terminal import Screen, on_terminal
from tests.visitor import Visitor

pytestmark = pytest.mark.processes
LIBRARIES = re.compile(r"\d+%\||it/s\]|Fetching|Reconstructing|Upload \d|Loading weights|Map:")
"""What only the bars of huggingface_hub, transformers and datasets look like."""
OWN = re.compile(r"^(start|fetch|check|decompose|upload|read rows|load weights|held-out|sample|train) [━╌\d]")


def phases(screen: Screen) -> list[str]:
    """The phases that were shown, each once, in order."""
    return list(dict.fromkeys(match[1] for line in screen.drawn if (match := OWN.match(line))))


def is_clean(screen: Screen, columns: int) -> None:
    """Nothing collides: every line is our own, fits, and no line of progress is left behind."""
    assert [line for line in screen.drawn if LIBRARIES.search(line)] == []
    assert [line for line in screen.left if OWN.match(line)] == []
    assert [line for line in screen.drawn if len(line) > columns] == []


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_decompose_and_push_of_a_model_of_the_hub(
    columns: int, hub: Hub, alice: Visitor, tmp_path: Path
) -> None:
    hub.create("org/model", medium.build(tmp_path / "model", layers=2, hidden=256, wide=512))
    alice.home.mkdir()
    status, screen = on_terminal(
        ["decompose", "org/model", "-o", "out", "--rank", 4, "--push", "alice/model-pissa"],
        columns,
        home=alice.home,
        environment=alice.variables,
    )
    assert status == 0, screen.left
    is_clean(screen, columns)
    shown = phases(screen)
    assert [phase for phase in ("fetch", "decompose") if phase not in shown] == []
    commit = hub.repositories["alice/model-pissa"].head().oid
    address = f"{hub.url}/alice/model-pissa/commit/{commit}"
    assert address in screen.output, "the address is broken into lines, and cannot be copied or clicked"


@pytest.mark.slow
def test_train_shows_each_of_its_phases(checkpoint: Build, tmp_path: Path) -> None:
    base = readable(checkpoint("llama", dtype=torch.bfloat16, tied=False), tmp_path / "base")
    write_sums(tmp_path / "rows.jsonl", rows=20)
    decompose(base, tmp_path / "pissa", SplitOptions(rank=4), Run(device="cpu", threads=1))
    words = ["train", "pissa", "-o", "out", "--data", "rows.jsonl", "--eval-rows", 8, "--steps", 30]
    more = ["--eval-every", 10, "--samples", 2, "--sample-tokens", 3, "--log-every", 15]
    status, screen = on_terminal([*words, *more], 80, home=tmp_path)
    assert status == 0, screen.left
    is_clean(screen, 80)
    assert "train" in phases(screen)
    logged = [line for line in screen.left if line.startswith("svdconvert: train ")]
    assert [re.findall(r"\d+/30 steps", line)[0] for line in logged] == ["15/30 steps", "30/30 steps"]
    line = next(line for line in reversed(screen.drawn) if line.startswith("train "))
    assert re.search(r"\d+/30 steps .*loss \d\.\d{4}  held-out \d\.\d{4}  [\d,]+ tokens/s", line)
    text = "\n".join(screen.left)
    assert re.search(r"held-out loss +\d\.\d{4} before, \d\.\d{4} after", text)
    assert re.search(r"loss curve +[▁▂▃▄▅▆▇█]+", text)
