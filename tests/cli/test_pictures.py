"""inspect draws losses and a heat map on a wide terminal, and nowhere else."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from svdconvert import inspect, read_manifest
from svdconvert.cli import summaries
from svdconvert.cli.pictures import pictures
from svdconvert.inputs.grids import ENERGY, grids_of, place_of
from svdconvert.inputs.inspection import Inspection
from tests.conftest import Build
from tests.program import succeeded


def drawn(width: int, **what: object) -> list[str]:
    """The lines of a made-up inspection."""
    found = Inspection("x", str(what.pop("kind", "decomposed")), "something", [], **what)  # type: ignore[arg-type]
    return list(pictures(found, width))


def test_a_curve_has_its_first_and_last_value_and_fits_the_terminal() -> None:
    for width in (40, 80, 200):
        (line,) = drawn(width, kind="trained", curves={"loss": [float(100 - at) for at in range(100)]})
        assert line.startswith("loss ") and line.endswith("  100.0000 to 1.0000")
        assert len(line) <= width and line.count("█") >= 1
    assert drawn(39, curves={"loss": [3.0, 2.0, 1.0]}) == []
    assert drawn(80, curves={"loss": [3.0, 2.0]}) == []


def test_a_heat_map_has_a_row_for_each_role_and_a_character_for_each_layer() -> None:
    rows = {"attn.q": {0: 0.0, 1: 0.5, 2: 1.0}, "mlp": {0: 0.25, 2: 0.75}}
    assert drawn(80, grids={"energy": rows}) == [
        "",
        "energy, by layer (0 to 2) and role",
        "attn.q  ·▒█",
        "mlp     ░ ▓",
        "        · is 0, █ is 1",
    ]


def test_a_heat_map_that_does_not_fit_is_left_out_and_a_trained_adapter_has_none() -> None:
    rows = {"a": {layer: float(layer) for layer in range(100)}}
    assert drawn(102, grids={"energy": rows}) == []
    assert len(drawn(103, grids={"energy": rows})) == 4
    assert drawn(200, kind="trained", grids={"energy": rows}) == []


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.self_attn.q_proj.weight", (12, "attn.q")),
        ("model.layers.0.mlp.experts.7.gate_proj.weight", (0, "mlp.experts.gate")),
        ("blocks.3.att.key.weight", (3, "att.key")),
        ("lm_head.weight", None),
        ("model.layers.1234567.mlp.up_proj.weight", None),
    ],
)
def test_the_place_of_a_tensor_is_its_layer_and_role(name: str, place: tuple[int, str] | None) -> None:
    assert place_of(name) == place


def test_inspect_draws_on_a_terminal_only_and_never_in_json(
    checkpoint: Build, decomposed: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    out: Path = decomposed(checkpoint("llama"))
    assert "by layer" not in succeeded("inspect", out).out
    found = json.loads(succeeded("inspect", out, "--json").out)
    grid = grids_of(read_manifest(out))[ENERGY]
    assert {(int(layer), role) for role, row in found["grids"][ENERGY].items() for layer in row} == {*grid}
    screen = StringIO()
    monkeypatch.setattr(summaries, "stdout", Console(file=screen, force_terminal=True, width=100))
    summaries.show_inspection(inspect(out))
    assert f"{ENERGY}, by layer (0 to 1) and role" in screen.getvalue()
    assert "attn.q" in screen.getvalue() and "█" in screen.getvalue()
