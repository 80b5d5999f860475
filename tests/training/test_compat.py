"""The private interfaces of other libraries that training uses still exist and do what it needs."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from svdconvert.training.compat import (
    attention_implementation,
    cpu_multiplies_bfloat16,
    remove_accelerate_wrappers,
    reset_accelerate_state,
)
from tests.training.small_runs import MakeModel


def test_after_a_reset_accelerate_accepts_another_precision() -> None:
    Accelerator(cpu=True, mixed_precision="bf16")
    with pytest.raises(ValueError, match="AcceleratorState"):
        Accelerator(cpu=True, mixed_precision="no")
    reset_accelerate_state()
    assert Accelerator(cpu=True, mixed_precision="no").mixed_precision == "no"


def test_a_prepared_model_is_as_before_without_the_wrappers(make_model: MakeModel) -> None:
    model = make_model()
    attributes = set(vars(model))
    forward = model.forward
    Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert model.forward != forward
    remove_accelerate_wrappers(model)
    assert set(vars(model)) == attributes
    assert model.forward == forward


def test_the_attention_of_a_transformers_model_has_a_name_and_that_of_others_has_none(
    make_model: MakeModel,
) -> None:
    assert attention_implementation(make_model()) == "sdpa"
    assert attention_implementation(nn.Linear(1, 1)) is None


def test_torch_knows_whether_the_cpu_multiplies_bfloat16() -> None:
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if "avx512_bf16" not in flags or "amx_tile" not in flags:
        pytest.skip("this torch does not list the capabilities of the CPU")
    assert cpu_multiplies_bfloat16() == bool(flags["avx512_bf16"] or flags["amx_tile"])
