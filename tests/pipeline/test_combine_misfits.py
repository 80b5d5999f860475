"""What only one of several checkpoints has is not lost or misread when they are combined."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdconvert import CombineOptions, Run, SvdConvertError, combine
from tests.conftest import Build
from tests.stock import tensors

RUN = Run(threads=1)
Q = "model.layers.0.self_attn.q_proj.weight"
Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture
def model(checkpoint: Build) -> Path:
    return checkpoint("llama", dtype=torch.float32, tied=False)


def changed(model: Path, out: Path, change: Change, **config: object) -> Path:
    """A copy of a model with other tensors and another configuration."""
    shutil.copytree(model, out)
    stored = load_file(out / "model.safetensors")
    change(stored)
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(values | config))
    return out


def with_biases(stored: dict[str, Tensor]) -> None:
    stored[Q.replace("weight", "bias")] = torch.ones(stored[Q].shape[0])


def deeper(stored: dict[str, Tensor]) -> None:
    for name in [*stored]:
        if ".layers.1." in name:
            stored[name.replace(".1.", ".2.")] = stored[name].clone()


def tied(stored: dict[str, Tensor]) -> None:
    del stored["lm_head.weight"]


@pytest.mark.parametrize(
    ("change", "lost"),
    [(with_biases, "q_proj.bias"), (deeper, r"layers\.2\."), (lambda stored: None, "lm_head.weight")],
)
def test_a_tensor_that_only_one_model_has_is_not_lost(
    change: Change, lost: str, model: Path, tmp_path: Path
) -> None:
    more = changed(model, tmp_path / "more", change)
    first = changed(model, tmp_path / "first", tied if "head" in lost else lambda stored: None)
    if "head" in lost:
        config = json.loads((first / "config.json").read_text())
        (first / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(SvdConvertError, match=f"more has .*{lost}.*would be lost"):
        combine([first, more], tmp_path / "out", run=RUN)
    assert not (tmp_path / "out").exists()


def test_what_no_network_reads_and_a_copy_of_a_tied_head_may_be_left_out(model: Path, tmp_path: Path) -> None:
    def copied(stored: dict[str, Tensor]) -> None:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
        stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    first = changed(model, tmp_path / "first", tied, tie_word_embeddings=True)
    second = changed(model, tmp_path / "second", copied, tie_word_embeddings=True)
    combine([first, second], tmp_path / "out", run=RUN)
    assert tensors(tmp_path / "out").keys() == tensors(first).keys()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("is_first", [True, False])
def test_codes_are_no_weights(dtype: torch.dtype, is_first: bool, model: Path, tmp_path: Path) -> None:
    def coded(stored: dict[str, Tensor]) -> None:
        stored[Q] = stored[Q].to(dtype)

    codes = changed(model, tmp_path / "codes", coded)
    for inputs in ([codes, model] if is_first else [model, codes], [codes, codes]):
        with pytest.raises(SvdConvertError, match=r"q_proj\.weight of .*codes is stored as (I8|F8_E4M3)"):
            combine(inputs, tmp_path / "out", run=RUN)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_value_that_is_not_finite_is_refused_with_its_tensor_and_model(
    value: float, is_first: bool, model: Path, tmp_path: Path
) -> None:
    def broken(stored: dict[str, Tensor]) -> None:
        stored[Q][1, 2] = value

    other = changed(model, tmp_path / "broken", broken)
    inputs = [other, model] if is_first else [model, other]
    with pytest.raises(
        SvdConvertError, match=rf"{Q} of .*broken holds NaN, Inf or values whose squares overflow"
    ):
        combine(inputs, tmp_path / "out", run=RUN)


def test_a_file_that_repeats_itself_without_end_is_refused(tmp_path: Path) -> None:
    source = "{model: a, layer_range: [0, 1]}"
    sources = ", ".join([f"&m {source}", *["*m"] * 9000])
    slices = "\n".join([f"- &s {{sources: [{sources}]}}", *["- *s"] * 9000])
    (tmp_path / "merge.yaml").write_text(f"merge_method: passthrough\nslices:\n{slices}\n")
    with pytest.raises(SvdConvertError, match="more than 200000 entries"):
        combine([], tmp_path / "out", run=RUN, config=tmp_path / "merge.yaml")


def scaled(stored: dict[str, Tensor]) -> None:
    stored[Q] *= 1.1


@pytest.mark.parametrize(
    "method", ["linear", "slerp", "ties", "task-arithmetic", "model-stock", "sce", "iso-c"]
)
def test_a_value_whose_square_overflows_is_refused_with_its_tensor_and_model(
    method: str, model: Path, tmp_path: Path
) -> None:
    """Norms that are infinite would make the result wrong."""

    def huge(stored: dict[str, Tensor]) -> None:
        stored[Q][1, 2] = 1e30

    broken = changed(model, tmp_path / "broken", huge)
    second = changed(model, tmp_path / "second", scaled)
    inputs = [broken] if method == "slerp" else [second, broken]
    options = CombineOptions(method=method, set={"t": 0.5} if method == "slerp" else None)
    base = None if method == "linear" else str(model)
    with pytest.raises(SvdConvertError, match=rf"{Q} of {broken} holds NaN, Inf or values whose squares"):
        combine(inputs, tmp_path / "out", options, RUN, base=base)


@pytest.mark.parametrize("options", [{}, {"method": "ties", "density": 0.0}], ids=str)
def test_a_combination_that_is_one_of_its_models_says_so(
    options: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    run = Run(threads=1, notify=said.append)
    inputs = [changed(model, tmp_path / "second", scaled)] if options else [model, model]
    base = str(model) if options else None
    combine(inputs, tmp_path / "out", CombineOptions(**options), run, base=base)
    assert [f"the merged weights are those of {model}" in one for one in said] == [True]


@pytest.mark.parametrize("value", ["nan", "inf", "abc"])
def test_a_parameter_that_is_no_number_is_named(value: str) -> None:
    with pytest.raises(ValueError, match=f"t is '{value}', which is no number"):
        CombineOptions(set=f"t={value}")  # type: ignore[arg-type]
