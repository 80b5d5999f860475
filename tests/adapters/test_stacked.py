"""The factors of all experts in one tensor, against PEFT's own arithmetic."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from svdconvert.adapters import stacked
from svdconvert.adapters.peft_files import open_adapter
from svdconvert.adapters.stacked import Member, Stack, nesting_depth, registration_order, stack_factors
from svdconvert.errors import ArtifactError
from svdconvert.linalg.factors import Factors
from svdconvert.manifest.place import Rows

PARAMETER = "layers.0.experts.gate_up_proj"


def factors(rows: int, columns: int, rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    )


GATE_AND_UP = {f"{e}.{part}": factors(3, 4, 2, 10 * e + n) for e in (0, 2) for n, part in enumerate("gu")}
APART = Stack(
    PARAMETER,
    3,
    4,
    (6, 4),
    tuple(Member(f"{e}.{part}", e, Rows(3 * n, 3), 2, 2 * n) for e in (0, 2) for n, part in enumerate("gu")),
    depth=1,
)
INTERLEAVED = Stack(
    PARAMETER,
    3,
    4,
    (6, 4),
    tuple(Member(f"{e}.{part}", e, Rows(n, 3, 2), 2, 2 * n) for e in (0, 2) for n, part in enumerate("gu")),
)


def written(stack: Stack, own: dict[str, Factors]) -> dict[str, Tensor]:
    def read(module: str, factor: str, rows: slice) -> Tensor:
        return own[module].pieces()[factor][rows]

    return {factor: torch.cat(list(stack.blocks(factor, read, "F32"))) for factor in stack.shapes()}


def peft_delta(tensors: dict[str, Tensor], experts: int, rank: int, shape: tuple[int, int]) -> Tensor:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.zeros(experts, *shape))
    config = LoraConfig(r=rank, lora_alpha=rank, target_parameters=["weight"])
    wrapper = ParamWrapper(holder, "default", "weight", config, r=rank, lora_alpha=rank)
    wrapper.lora_A["default"].weight.data = tensors["lora_A"]
    wrapper.lora_B["default"].weight.data = tensors["lora_B"]
    return wrapper.get_delta_weight("default").detach()


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
@pytest.mark.parametrize("stack", [APART, INTERLEAVED], ids=["one after the other", "interleaved"])
def test_what_is_written_is_what_peft_adds(stack: Stack, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "_BLOCK", block)
    found = peft_delta(written(stack, GATE_AND_UP), 3, 4, (6, 4))
    wanted = torch.zeros(3, 6, 4)
    for member in stack.members:
        assert member.rows is not None
        wanted[member.expert, member.rows.slice] = GATE_AND_UP[member.module].dense(1.0)
    assert torch.allclose(found, wanted, atol=1e-6)
    together = stack_factors(stack, GATE_AND_UP)
    assert list(together) == [f"{PARAMETER}[{expert}]" for expert in range(3)]
    for expert, each in enumerate(together.values()):
        assert torch.allclose(each.dense(1.0), wanted[expert], atol=1e-6)


def save(directory: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    prefix = "base_model.model."
    save_file(
        {prefix + name: tensor for name, tensor in tensors.items()}, directory / "adapter_model.safetensors"
    )
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [], **config}
    (directory / "adapter_config.json").write_text(json.dumps(values))
    return directory


NAMES = ["experts.gate_up_proj", "experts.down_proj"]


def test_a_file_is_read_expert_by_expert(tmp_path: Path) -> None:
    down = {f"{e}": factors(4, 3, 2, e) for e in range(3)}
    stack = Stack("layers.0.experts.down_proj", 3, 2, (4, 3), tuple(Member(n, int(n), None, 2) for n in down))
    inner, outer = written(APART, GATE_AND_UP), written(stack, down)
    save(
        tmp_path,
        {f"layers.0.experts.base_layer.{name}.weight": tensor for name, tensor in inner.items()}
        | {f"layers.0.experts.{name}.weight": tensor for name, tensor in outer.items()},
        target_parameters=NAMES,
        rank_pattern={"gate_up_proj": 4},
        alpha_pattern={"gate_up_proj": 6},
    )
    adapter = open_adapter(tmp_path)
    assert set(adapter.modules) == {f"{PARAMETER}[{e}]" for e in range(3)} | {
        f"layers.0.experts.down_proj[{e}]" for e in range(3)
    }
    assert adapter.config.scale(f"{PARAMETER}[1]") == 1.5
    assert adapter.config.scale("layers.0.experts.down_proj[1]") == 1.0
    together = stack_factors(APART, GATE_AND_UP)
    for module, each in together.items():
        assert adapter.shape(module, "lora_B") == (6, 4) and adapter.shape(module, "lora_A") == (4, 4)
        assert torch.equal(adapter.factors(module).left_OR, each.left_OR)
        assert torch.equal(adapter.factors(module).right_RI, each.right_RI)
    assert torch.equal(adapter.factors("layers.0.experts.down_proj[2]").left_OR, down["2"].left_OR)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"target_parameters": NAMES[:1]},
            "has 2 adapters of layers.0.experts, but target_parameters names 1",
        ),
        ({"r": 5}, "are no factors of experts at rank 5"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    change: dict[str, object], match: str, tmp_path: Path
) -> None:
    shapes = {"lora_A.weight": (6, 4), "lora_B.weight": (4, 6)}
    tensors = {
        f"layers.0.experts.{before}{name}": torch.ones(shape)
        for before in ("", "base_layer.")
        for name, shape in shapes.items()
    }
    with pytest.raises(ArtifactError, match=match):
        open_adapter(save(tmp_path, tensors, **{"target_parameters": NAMES, **change}))


def test_a_layer_that_is_named_by_its_parameter_is_a_plain_module(tmp_path: Path) -> None:
    tensors = {"mlp.up_proj.lora_A.weight": torch.ones(2, 4), "mlp.up_proj.lora_B.weight": torch.ones(5, 2)}
    adapter = open_adapter(
        save(tmp_path, tensors, target_parameters=["up_proj.weight"], alpha_pattern={"weight": 8})
    )
    assert list(adapter.modules) == ["mlp.up_proj"] and not adapter.experts
    assert adapter.config.scale("mlp.up_proj") == 4.0


def test_wrappers_are_nested_in_the_order_of_registration() -> None:
    adapted = ["x.experts.down_proj", "x.experts.gate_up_proj", "y.experts.down_proj"]
    assert [nesting_depth(name, adapted) for name in adapted] == [0, 1, 0]
    assert registration_order(["down_proj", "up_proj", "gate_proj"]) == ["gate_proj", "up_proj", "down_proj"]
