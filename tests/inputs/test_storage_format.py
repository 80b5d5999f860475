"""Quantised weights are recognised and refused with the name of the quantisation or of their scale."""

from typing import Any

import pytest

from svdconvert.checkpoint.tensors import REAL, TensorInfo
from svdconvert.errors import TargetError
from svdconvert.inputs.storage_format import quantization_method, refuse_codes, refuse_unknown_format

NAME = "model.layers.0.mlp.up_proj.weight"


def infos(dtype: str, *companions: str) -> dict[str, TensorInfo]:
    path = NAME.removesuffix("weight")
    names = [NAME, *(path + companion for companion in companions)]
    return {name: TensorInfo(name, (4, 4), dtype if name == NAME else "F32") for name in names}


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3", "F8_E5M2", "I32"])
def test_codes_are_refused(dtype: str) -> None:
    with pytest.raises(TargetError, match=f"{NAME} of m is stored as {dtype}, which is not supported"):
        refuse_codes("m", {}, infos(dtype), [NAME])


@pytest.mark.parametrize(
    ("config", "companions", "words"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, [], r"\(quantisation fp8\)"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, [], r"\(quantisation awq\)"),
        ({"quantization_config": {}}, [], r"\(quantisation unnamed\)"),
        ({}, ["weight_scale_inv"], r"with model.layers.0.mlp.up_proj.weight_scale_inv as its scale"),
        ({}, ["SCB"], r"with model.layers.0.mlp.up_proj.SCB as its scale"),
    ],
)
def test_the_quantisation_is_named(config: dict[str, Any], companions: list[str], words: str) -> None:
    with pytest.raises(TargetError, match=words):
        refuse_codes("m", config, infos("I8", *companions), [NAME])


@pytest.mark.parametrize("dtype", sorted(REAL))
def test_real_numbers_are_accepted(dtype: str) -> None:
    refuse_codes("m", {"quantization_config": {"quant_method": "fp8"}}, infos(dtype), [NAME])


def test_only_the_given_names_matter() -> None:
    refuse_codes("m", {}, infos("I8"), [])
    assert quantization_method({"quantization_config": "fp8"}) is None


class Headers:
    """A TensorSource without data."""

    def __init__(self, found: dict[str, TensorInfo]) -> None:
        self.infos = found


def test_a_quantised_checkpoint_must_be_understood_completely() -> None:
    source: Any = Headers(infos("I8"))
    config = {"quantization_config": {"quant_method": "hqq"}}
    with pytest.raises(
        TargetError, match=f"m is quantised .quantisation hqq. in a way.*explains {NAME}, stored"
    ):
        refuse_unknown_format("m", config, source)
    refuse_unknown_format("m", {}, source)


@pytest.mark.parametrize("name", ["h.0.attn.bias", "embeddings.position_ids", "h.0.attn.masked_bias"])
def test_buffers_of_integers_are_no_codes(name: str) -> None:
    source: Any = Headers({name: TensorInfo(name, (1, 4), "U8")})
    refuse_unknown_format("m", {"quantization_config": {"quant_method": "fp8"}}, source)
