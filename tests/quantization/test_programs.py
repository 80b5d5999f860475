"""Checkpoints that other programs wrote, decoded as they decode them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from svdconvert.inputs.model import open_model
from svdconvert.inputs.storage_format import formats
from svdconvert.quantization.view import read_to_compute
from tests.quantization.checkpoints import plain

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "title"),
    [
        ({**FOUR_BITS, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes NF4"),
        ({**FOUR_BITS, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes FP4"),
        (
            {**FOUR_BITS, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            "bitsandbytes NF4 with double quantisation",
        ),
        ({**FOUR_BITS, "bnb_4bit_quant_storage": torch.bfloat16}, "bitsandbytes FP4"),
        ({"load_in_8bit": True}, "bitsandbytes 8-bit"),
    ],
)
def test_what_transformers_saves_with_bitsandbytes(
    settings: dict[str, Any], title: str, tmp_path: Path
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    model = AutoModelForCausalLM.from_pretrained(
        plain(tmp_path / "plain"), quantization_config=BitsAndBytesConfig(**settings), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "saved")
    opened = open_model(str(tmp_path / "saved"))
    assert formats(opened.source) == {title: 14}
    for name in opened.source.coded:  # type: ignore[attr-defined]
        weight = model.get_submodule(name.removesuffix(".weight")).weight
        found = read_to_compute(opened.source, name)
        if "load_in_8bit" in settings:
            expected = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
            torch.testing.assert_close(found, expected.float(), rtol=3e-7, atol=0)
            continue
        if weight.shape[0] % 64 or found.shape[1] % 64:
            continue  # its CPU kernel decodes such shapes wrongly
        expected = functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(found.bfloat16(), expected), name
