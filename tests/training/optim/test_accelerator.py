"""Device and precision are those of the arguments, and what accelerate cannot do here is refused."""

from dataclasses import replace

import pytest
import torch

from svdconvert.errors import RecipeError
from svdconvert.training.optim.accelerator import make_accelerator
from tests.training.small_runs import OPTIONS


def test_precision_and_device_are_those_of_the_options() -> None:
    for precision, expected in (("bf16", "bf16"), ("fp32", "no")):
        accelerator = make_accelerator(replace(OPTIONS, precision=precision))
        assert (accelerator.mixed_precision, accelerator.device.type) == (expected, "cpu")


@pytest.mark.parametrize(("units", "expected"), [(True, "bf16"), (False, "no")])
def test_auto_chooses_bf16_on_a_cpu_with_bf16_instructions(
    units: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert make_accelerator(replace(OPTIONS, precision="auto")).mixed_precision == expected


def test_sharding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator, DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    with pytest.raises(RecipeError, match="accelerate is set to FSDP.*use DDP"):
        make_accelerator(OPTIONS)


def test_fp16_is_refused_on_a_cpu() -> None:
    with pytest.raises(RecipeError, match="fp16 needs a GPU.*give bf16 or fp32"):
        make_accelerator(replace(OPTIONS, precision="fp16"))


@pytest.mark.parametrize("device", ["xpu:9", "nonsense", "meta"])
def test_an_unavailable_device_is_refused(device: str) -> None:
    with pytest.raises(RecipeError, match=f"device {device}"):
        make_accelerator(replace(OPTIONS, device=device))
