"""An interrupted run on a quantised model continues to the same bytes."""

from pathlib import Path
from typing import Any

import pytest

from svdconvert import MergeOptions, Run, SplitOptions, decompose, merge
from svdconvert.config.progress import Progress
from tests.program import content
from tests.quantization.checkpoints import plain, quantise


class Stopped(Exception):
    """Raised in the middle of a run."""


def stopping(after: int) -> Run:
    """A run that ends with an error after some tensors."""
    left = [after]

    def track(_: Progress) -> None:
        left[0] -= 1
        if not left[0]:
            raise Stopped

    return Run(device="cpu", threads=1, track=track)


@pytest.mark.parametrize("kind", ["int4", "nf4-double"])
def test_both_commands_continue_to_the_same_bytes(kind: str, tmp_path: Path) -> None:
    model = quantise(plain(tmp_path / "plain"), tmp_path / "model", kind)
    run = Run(device="cpu", threads=1)
    options = SplitOptions(rank=4, max_shard_size="20KB")
    decompose(model, tmp_path / "whole", options, run)
    with pytest.raises(Stopped):
        decompose(model, tmp_path / "again", options, stopping(9))
    decompose(model, tmp_path / "again", options, run)
    assert content(tmp_path / "again") == content(tmp_path / "whole")
    for keep in (False, True):
        chosen: dict[str, Any] = {"side": "base", "max_shard_size": "20KB", "keep_format": keep}
        out = tmp_path / f"merged-{keep}"
        merge(tmp_path / "whole", out, MergeOptions(**chosen), run)
        with pytest.raises(Stopped):
            merge(tmp_path / "whole", tmp_path / "stopped", MergeOptions(**chosen), stopping(7))
        merge(tmp_path / "whole", tmp_path / "stopped", MergeOptions(**chosen), run)
        assert content(tmp_path / "stopped") == content(out)
        (tmp_path / "stopped").rename(tmp_path / f"done-{keep}")
