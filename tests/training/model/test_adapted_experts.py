"""Experts with adapters: the losses are PEFT's, and only the tokens of an expert are computed."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from svdconvert.adapters.peft_files import open_adapter
from svdconvert.adapters.stacked import registration_order
from svdconvert.commands.decompose import decompose
from svdconvert.commands.merge import merge
from svdconvert.commands.to_lora import to_lora
from svdconvert.commands.train import train
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.config.train import TrainOptions
from svdconvert.errors import ArtifactError, RecipeError
from svdconvert.inputs.model import open_model
from svdconvert.manifest.schema import read_manifest
from svdconvert.methods.base import METHODS
from svdconvert.output.measurements import losses as recorded_losses
from svdconvert.training.model.adapted_experts import AdaptedExperts
from svdconvert.training.model.inject import extract_factors, inject_adapters
from svdconvert.training.optim.orthonormality import Penalty
from svdconvert.training.start import start_from_decomposed
from tests.families.inputs import TOKENS
from tests.mixtures import FAMILIES, mixture
from tests.reading import write_sums, write_tokenizer
from tests.stock import adapted, plain, start_of

pytestmark = pytest.mark.slow

RUN = Run(device="cpu", threads=1)
MODELS = Path(transformers.__file__).parent / "models"
Make = Callable[..., Path]


def decomposed(family: str, directory: Path, *, stacked: bool = False, **options: object) -> Path:
    base = mixture(family, directory / "base", stacked=stacked)
    decompose(base, directory / "out", SplitOptions(**{"rank": 4, **options}), RUN)  # type: ignore[arg-type]
    return directory / "out"


def injected(out: Path) -> PreTrainedModel:
    manifest = read_manifest(out)
    start = start_from_decomposed(out, manifest, open_model(str(out)), None)
    network = plain(out)
    paths = {matrix.module: matrix.module for matrix in manifest.matrices.values()}
    trains = METHODS.get(manifest.method).trains
    inject_adapters(network, start.scaled_factors(), trains, paths=paths, projections=start.projections())
    return network


def losses(model: nn.Module, steps: int = 10) -> list[float]:
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    found = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS % 57, labels=TOKENS % 57, use_cache=False).loss
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_losses_are_those_of_peft(family: str, stacked: bool, tmp_path: Path) -> None:
    out = decomposed(family, tmp_path, stacked=stacked)
    ours = injected(out)
    assert any(isinstance(module, AdaptedExperts) for module in ours.modules())
    theirs = PeftModel.from_pretrained(plain(out), start_of(out), is_trainable=True)
    found, wanted = losses(ours), losses(theirs)
    assert found[-1] < found[0]
    assert found == pytest.approx(wanted, abs=1e-4)


def test_experts_by_themselves_start_at_the_source_and_stay_apart(tmp_path: Path) -> None:
    out = decomposed("mixtral", tmp_path, experts="each")
    network = injected(out)
    with torch.no_grad():
        wanted = plain(tmp_path / "base")(input_ids=TOKENS % 57).logits
        assert (network(input_ids=TOKENS % 57).logits - wanted).abs().max() < 1e-5 * wanted.std() * 100
    found = losses(network)
    assert found[-1] < found[0]
    factors = extract_factors(network)
    assert factors.keys() == open_adapter(start_of(out)).modules.keys()
    assert {each.rank for each in factors.values()} == {4}


def test_only_the_tokens_of_an_expert_are_computed(tmp_path: Path) -> None:
    network = injected(decomposed("qwen2_moe", tmp_path))
    experts = next(module for module in network.modules() if isinstance(module, AdaptedExperts))
    hidden = torch.randn(5, 32, requires_grad=True)
    index = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [0, 2]])
    with torch.no_grad():
        for branch in experts.own_branches():
            branch.lora_A[[1, 3]] = torch.nan
        for name in ("gate_up_proj", "down_proj"):
            experts.base.get_parameter(name)[[1, 3]] = torch.nan
    found = experts(hidden, index, torch.rand(5, 2))
    assert found.isfinite().all()
    found.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    for branch in experts.own_branches():
        gradient = branch.lora_A.grad
        assert gradient is not None and not gradient[[1, 3]].any() and gradient[[0, 2]].any()


def test_the_penalty_is_the_mean_over_the_factors_of_every_expert(tmp_path: Path) -> None:
    network = injected(decomposed("mixtral", tmp_path, method="sorsa"))
    losses(network, steps=2)
    factors = extract_factors(network).values()
    norms = [_distance(each.right_RI) for each in factors] + [_distance(each.left_OR.T) for each in factors]
    for parameter in network.parameters():
        parameter.grad = None
    assert Penalty(0.5).add_gradient(network) == pytest.approx(sum(norms) / len(norms), rel=1e-5)


def _distance(rows: Tensor) -> float:
    return float(torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows))))


@pytest.mark.parametrize("form", ["fused", "each"])
@pytest.mark.parametrize("how", ["decomposed", "plain", "plain and stacked"])
def test_train_writes_what_merge_and_peft_take(how: str, form: str, tmp_path: Path) -> None:
    base = mixture("mixtral", tmp_path / "base", stacked="stacked" in how)
    write_tokenizer(base)
    data = str(write_sums(tmp_path / "rows.jsonl", rows=6))
    options = TrainOptions(data=data, steps=2, batch_size=2, max_length=48, lr=0.01)
    split = SplitOptions(rank=4, experts=form)  # type: ignore[arg-type]
    start = base
    if how == "decomposed":
        decompose(base, tmp_path / "start", split, RUN)
        start = tmp_path / "start"
    train(start, tmp_path / "trained", options, RUN, split=None if how == "decomposed" else split)
    merge(tmp_path / "trained", tmp_path / "merged", base=str(base))
    to_lora(tmp_path / "trained", tmp_path / "lora")
    tokens = {"input_ids": TOKENS % 57}
    with torch.no_grad():
        merged = plain(tmp_path / "merged")(**tokens).logits
        before = plain(base)(**tokens).logits
        lora = adapted(base, tmp_path / "lora")(**tokens).logits
    assert (lora - merged).abs().max() < 1e-4 * merged.std()
    assert (before - merged).abs().max() > 1e-3 * merged.std()


@pytest.mark.parametrize(
    "options", [{"precision": "bf16"}, {"gradient_checkpointing": True}, {"train_also": ("norms",)}], ids=str
)
def test_experts_are_trained_with_the_options_of_train(options: dict[str, object], tmp_path: Path) -> None:
    out = decomposed("mixtral", tmp_path, stacked=True)
    write_tokenizer(tmp_path / "base")
    write_tokenizer(out)
    data = str(write_sums(tmp_path / "rows.jsonl", rows=8))
    common = {"data": data, "steps": 6, "batch_size": 4, "max_length": 48, "lr": 0.02}
    train(out, tmp_path / "trained", TrainOptions(**common, **options), RUN)  # type: ignore[arg-type]
    found, _ = recorded_losses(tmp_path / "trained" / "metrics.jsonl")
    assert len(found) == 6 and found[-1] < found[0]
    before, after = open_adapter(start_of(out)), open_adapter(tmp_path / "trained")
    assert before.modules.keys() == after.modules.keys()
    merge(tmp_path / "trained", tmp_path / "merged", base=str(tmp_path / "base"))


def test_dropout_on_experts_is_refused(tmp_path: Path) -> None:
    out = decomposed("mixtral", tmp_path)
    write_tokenizer(out)
    data = str(write_sums(tmp_path / "rows.jsonl", rows=8))
    with pytest.raises(RecipeError, match="--dropout 0.1 is not possible for .*experts"):
        train(out, tmp_path / "trained", TrainOptions(data=data, steps=1, dropout=0.1), RUN)


def test_factors_of_other_experts_are_refused(tmp_path: Path) -> None:
    out = decomposed("mixtral", tmp_path)
    manifest = read_manifest(out)
    factors = start_from_decomposed(out, manifest, open_model(str(out)), None).scaled_factors()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    one = factors[f"{name}[0]"]
    with pytest.raises(ArtifactError, match=r"gate_up_proj\[7\]: the model has 3 experts"):
        inject_adapters(plain(out), {f"{name}[7]": one}, frozenset({"lora_A"}))
    with pytest.raises(ArtifactError, match="no parameter model.layers.0.mlp.experts.other of experts"):
        inject_adapters(plain(out), {"model.layers.0.mlp.experts.other[0]": one}, frozenset({"lora_A"}))


def test_every_family_registers_the_parameters_of_experts_in_the_assumed_order() -> None:
    found = list(_registered())
    assert len(found) > 40
    assert [names for names in found if names != registration_order(names)] == []


def _registered() -> Iterator[list[str]]:
    """The names of stacked parameters as the code has them, for every class of experts of transformers."""
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and "Experts" in node.name:
                names = [
                    target.attr
                    for line in ast.walk(node)
                    if isinstance(line, ast.Assign) and "nn.Parameter(" in ast.unparse(line.value)
                    for target in line.targets
                    if isinstance(target, ast.Attribute) and target.attr.endswith("_proj")
                ]
                if len(names) > 1:
                    yield names
