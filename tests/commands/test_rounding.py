"""merge says how much of the update the stored numbers hold, and has two remedies."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svdconvert.commands.merge import merge
from svdconvert.manifest.schema import read_manifest
from svdconvert.manifest.training import Training
from svdconvert.pipeline.merge import MergeOptions, remark_on_rounding
from tests.program import succeeded, svdconvert
from tests.stock import same_bytes, tensors, trained_from

Build = Callable[..., Path]
SMALL = 1e-4


@pytest.fixture
def small(checkpoint: Build, decomposed: Build, tmp_path: Path) -> tuple[Path, Path]:
    """A bfloat16 DECOMPOSED directory, and an adapter that training hardly moved."""
    out = decomposed(checkpoint("llama"))
    return trained_from(out, tmp_path / "trained", SMALL), out


@pytest.mark.parametrize("side", ["base", "residual"])
def test_a_small_update_is_warned_about_and_written_down(
    side: str, small: tuple[Path, Path], tmp_path: Path
) -> None:
    trained, out = small
    command = ("merge", trained, "-o", tmp_path / "out", "--residual", out, "--from", side)
    ended = svdconvert(*command)
    assert ended.status == 0
    assert "rounding swallows updates in 14 of 14 matrices" in ended.err
    assert "--dtype float32" in ended.err and "--rounding stochastic" in ended.err
    assert ended.err.index("to-lora") < ended.err.index("--dtype float32")
    note = read_manifest(tmp_path / "out").result.update
    assert f"{note.kept:.1%} of the training's change is in the merged weights" in ended.err
    assert f"about {1 - (1 - note.kept) ** 2:.0%} of what the training gained in loss should" in ended.err
    assert len(note.matrices) == 14
    assert all(0 <= row.cosine < 0.95 for row in note.matrices.values())
    assert 0 <= note.cosine < 0.95
    assert f"cosine {note.cosine:.4f}" in ended.out


@pytest.mark.parametrize("keep_best", [False, True])
def test_the_warning_says_which_loss_to_expect(
    keep_best: bool, small: tuple[Path, Path], tmp_path: Path
) -> None:
    trained, out = small
    losses = ((0, 3.0), (5, 1.0), (9, 2.0))
    training = Training(options={"keep_best": keep_best}, steps=9, held_out=losses)
    merge(trained, tmp_path / "out", residual=str(out))
    merged = replace(read_manifest(tmp_path / "out"), training=training)
    (sentence,) = remark_on_rounding(merged, "advice")
    after = 1.0 if keep_best else 2.0
    kept = merged.result.update.kept
    expected = 3 - (1 - (1 - kept) ** 2) * (3 - after)
    assert f"near {expected:.4f}, which was 3.0000 before training and is {after:.4f} with all" in sentence


def test_what_is_written_down_is_what_the_files_hold(
    small: tuple[Path, Path], checkpoint: Build, tmp_path: Path
) -> None:
    trained, out = small
    merge(trained, tmp_path / "half", residual=str(out))
    merge(trained, tmp_path / "whole", MergeOptions(dtype="float32"), residual=str(out))
    base, half, whole = (
        tensors(path) for path in (checkpoint("llama"), tmp_path / "half", tmp_path / "whole")
    )
    note = read_manifest(tmp_path / "half").result.update
    total = torch.zeros(3, dtype=torch.float64)
    for name, row in note.matrices.items():
        intended = whole[name].double() - base[name].double()
        real = half[name].double() - base[name].double()
        sums = torch.stack([(real * intended).sum(), intended.square().sum(), real.square().sum()])
        assert row.kept == pytest.approx(float(sums[0] / sums[1]), abs=1e-2)
        total += sums
    assert note.cosine == pytest.approx(float(total[0] / (total[1] * total[2]).sqrt()), abs=1e-2)


def test_float32_keeps_the_update_whole_and_stochastic_rounding_on_average(
    small: tuple[Path, Path], tmp_path: Path
) -> None:
    trained, out = small
    command = ("merge", trained, "--residual", out, "-o")
    shown = svdconvert(*command, tmp_path / "whole", "--dtype", "float32")
    assert "swallows" not in shown.err
    assert read_manifest(tmp_path / "whole").result.update.cosine > 0.9999
    shown = svdconvert(*command, tmp_path / "chance", "--rounding", "stochastic")
    assert "swallows" not in shown.err
    assert 0.8 < read_manifest(tmp_path / "chance").result.update.kept < 1.2
    succeeded(*command, tmp_path / "again", "--rounding", "stochastic", "--threads", 1)
    succeeded(*command, tmp_path / "other", "--rounding", "stochastic", "--seed", 1)
    chance, again, other = (tensors(tmp_path / name) for name in ("chance", "again", "other"))
    assert same_bytes(chance, again) and not same_bytes(chance, other)


def test_a_large_update_is_not_warned_about_and_none_is_not_measured(
    checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    out = decomposed(checkpoint("llama"))
    trained = trained_from(out, tmp_path / "trained", 0.3)
    shown = svdconvert("merge", trained, "-o", tmp_path / "out", "--residual", out)
    assert "swallows" not in shown.err
    assert read_manifest(tmp_path / "out").result.update.cosine > 0.95
    merge(out, tmp_path / "back")
    assert "update" not in read_manifest(tmp_path / "back").options
