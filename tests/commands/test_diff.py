"""diff: its numbers are those of dense float64 arithmetic."""

import json
import shutil
from math import exp
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file

from svdconvert import Run, SplitOptions, TrainOptions, decompose, diff, train
from svdconvert.errors import ArtifactError, RecipeError
from svdconvert.pipeline.diff import ModelDiff
from svdconvert.pipeline.diff_adapters import AdapterDiff
from svdconvert.reports import diff_picture
from tests import stock
from tests.commands.test_extract import changes, tuned_from
from tests.conftest import Build
from tests.program import refused, svdconvert
from tests.reading import readable, write_sums

RUN = Run(device="cpu", threads=1)


@pytest.fixture(scope="module")
def models(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = checkpoint("llama", dtype=torch.bfloat16, tied=False)
    return base, tuned_from(base, tmp_path_factory.mktemp("tuned") / "tuned")


def test_every_number_of_a_tensor_is_the_dense_one(models: tuple[Path, Path]) -> None:
    found = diff(*models, RUN)
    assert isinstance(found, ModelDiff)
    before, after = stock.tensors(models[0]), stock.tensors(models[1])
    moves = changes(*models)
    assert [one.name for one in found.tensors] == [*before] or {one.name for one in found.tensors} == {
        *before
    }
    for one in found.tensors:
        first, second = before[one.name].double().numpy(), after[one.name].double().numpy()
        assert one.norm == pytest.approx(np.linalg.norm(first), rel=1e-6)
        assert one.change == pytest.approx(np.linalg.norm(moves[one.name]), rel=1e-6)
        assert one.relative == pytest.approx(np.linalg.norm(second - first) / np.linalg.norm(first), rel=1e-6)
        assert one.moved == pytest.approx((first != second).mean())
        cosine = (first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second)
        assert one.cosine == pytest.approx(cosine, abs=1e-9)
        if one.spectral is None:
            assert one.layer is None
            continue
        squares = np.linalg.svd(moves[one.name], compute_uv=False) ** 2
        shares = squares / squares.sum()
        assert one.spectral.stable_rank == pytest.approx(squares.sum() / squares[0], rel=1e-5)
        assert one.spectral.effective_rank == pytest.approx(exp(-(shares * np.log(shares)).sum()), rel=1e-5)
        assert one.spectral.rank_90 == int((shares.cumsum() < 0.9).sum()) + 1
        assert one.spectral.rank_99 == int((shares.cumsum() < 0.99).sum()) + 1


def test_groups_sum_over_their_tensors(models: tuple[Path, Path]) -> None:
    found = diff(*models, RUN)
    assert isinstance(found, ModelDiff)
    whole = found.groups()[-1]
    moves, before = changes(*models), stock.tensors(models[0])
    change = sum((move**2).sum() for move in moves.values())
    norm = sum(float((tensor.double() ** 2).sum()) for tensor in before.values())
    assert whole.role == "all" and whole.tensors == len(before)
    assert whole.relative == pytest.approx((change / norm) ** 0.5, rel=1e-6)
    assert {row.role for row in found.groups()} >= {"attn.q", "mlp.down", "others"}


def test_a_checkpoint_and_itself_agree(models: tuple[Path, Path]) -> None:
    found = diff(models[0], models[0], RUN)
    assert isinstance(found, ModelDiff)
    assert all(one.moved == 0 and one.change == 0 and one.spectral is None for one in found.tensors)


def test_tensors_without_a_counterpart_are_named(checkpoint: Build, tmp_path: Path) -> None:
    def grown(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.cat([tensor, tensor[:2]]) if "embed_tokens" in name else tensor

    base = checkpoint("llama", dtype=torch.float32, tied=False)
    found = diff(base, tuned_from(base, tmp_path / "tuned", grown), RUN)
    assert isinstance(found, ModelDiff)
    assert len(found.mismatches) == 1 and "model.embed_tokens.weight has the shape" in found.mismatches[0]


def test_the_command_prints_a_table_json_and_a_picture(models: tuple[Path, Path], tmp_path: Path) -> None:
    picture = tmp_path / "diff.svg"
    shown = svdconvert("diff", *models, "--picture", picture)
    assert shown.status == 0 and "attn.q" in shown.out and "99 %" in shown.out
    content = json.loads(svdconvert("diff", *models, "--json").out)
    assert {row["role"] for row in content["groups"]} >= {"all", "attn.q"}
    root = ElementTree.parse(picture).getroot()
    titles = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    cells = [title for title in titles if ", layer " in title]
    assert len(cells) == 2 * 7 and any(title.startswith("attn.q, layer 1: ") for title in cells)
    again = svdconvert("diff", *models, "--picture", picture)
    assert again.status == 1 and "exists already" in again.err


@pytest.fixture(scope="module")
def adapters(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A PiSSA and a LoRA adapter, trained."""
    home = tmp_path_factory.mktemp("adapters")
    base = readable(checkpoint("llama", dtype=torch.float32, tied=False), home / "base")
    options = TrainOptions(
        data=str(write_sums(home / "rows.jsonl")), steps=2, batch_size=2, max_length=48, lr=0.1
    )
    made = []
    for method, rank in (("pissa", 4), ("lora", 3)):
        decompose(base, home / f"{method}-start", SplitOptions(method=method, rank=rank), RUN)
        train(home / f"{method}-start", home / method, options, RUN)
        made.append(home / method)
    return made


def dense(directory: Path, module: str) -> np.ndarray:
    """What training changed, in float64: s B A - s B0 A0 with the scale 1 of alpha = rank."""
    start = next(directory.glob("*_init"))
    products = []
    for place in (directory, start):
        factors = stock.tensors(place)
        left, right = (factors[f"base_model.model.{module}.{side}.weight"] for side in ("lora_B", "lora_A"))
        products.append(left.double().numpy() @ right.double().numpy())
    return products[0] - products[1]


def test_two_adapters_are_compared_as_dense_matrices_would_be(adapters: list[Path]) -> None:
    found = diff(*adapters, RUN)
    assert isinstance(found, AdapterDiff)
    assert len(found.modules) == 14
    for one in found.modules:
        first, second = (dense(directory, one.module) for directory in adapters)
        assert one.relation.norms == pytest.approx((np.linalg.norm(first), np.linalg.norm(second)), rel=1e-4)
        assert one.relation.distance == pytest.approx(np.linalg.norm(second - first), rel=1e-4)
        cosine = (first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second)
        assert one.relation.cosine == pytest.approx(cosine, abs=1e-4)
        for angles, transposed in ((one.relation.left_angles, False), (one.relation.right_angles, True)):
            spaces = [
                scipy.linalg.orth(matrix.T if transposed else matrix, rcond=1e-5)
                for matrix in (first, second)
            ]
            wanted = np.degrees(scipy.linalg.subspace_angles(*spaces))[::-1]
            assert len(angles) == min(one.relation.ranks)
            assert angles == pytest.approx(wanted[: len(angles)], abs=0.1)


def test_an_adapter_and_itself_have_no_angle_between_them(adapters: list[Path]) -> None:
    found = diff(adapters[0], adapters[0], RUN)
    assert isinstance(found, AdapterDiff) and found.cosine == pytest.approx(1.0)
    assert all(max(one.relation.left_angles) < 1e-3 for one in found.modules)


def test_a_picture_is_not_written_through_a_link_or_over_a_file(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link.svg").symlink_to(tmp_path / "elsewhere.svg")
    words = ["diff", *models, "--picture"]
    refused(*words, tmp_path / "link.svg", words=["link.svg exists already"])
    late = tmp_path / "late.svg"

    def drawn(*arguments: object) -> str:
        late.write_text("mine")
        return "<svg/>"

    monkeypatch.setattr(diff_picture, "heatmap", drawn)
    refused(*words, late, words=["late.svg appeared in the meantime"])
    assert late.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"link.svg", "late.svg"}


def test_adapters_have_a_picture_too(adapters: list[Path], tmp_path: Path) -> None:
    shown = svdconvert("diff", *adapters, "--picture", tmp_path / "adapters.svg")
    assert shown.status == 0 and "degrees" in shown.out
    assert "self_attn.q_proj" in (tmp_path / "adapters.svg").read_text()


def test_an_adapter_and_a_checkpoint_are_refused(adapters: list[Path], models: tuple[Path, Path]) -> None:
    with pytest.raises(ArtifactError, match="give two of one kind"):
        diff(adapters[0], models[0], RUN)


def test_an_adapter_whose_start_is_lost_is_refused(adapters: list[Path], tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    shutil.copytree(adapters[0], lost, ignore=shutil.ignore_patterns("*_init", "svdconvert.json"))
    config = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    with pytest.raises(ArtifactError, match="initial state is unknown"):
        diff(lost, adapters[1], RUN)


def test_stream_without_the_hub_is_refused(adapters: list[Path], models: tuple[Path, Path]) -> None:
    for pair in (adapters, models):
        with pytest.raises(RecipeError, match="--stream changes nothing here"):
            diff(*pair, Run(stream=True))


def test_names_of_layers_and_files_are_escaped_in_the_picture(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    odd = tmp_path / "<script>&"
    shutil.copytree(models[1], odd)
    assert svdconvert("diff", models[0], odd, "--picture", tmp_path / "odd.svg").status == 0
    assert "<script>" not in (tmp_path / "odd.svg").read_text()


def test_weights_of_8_bits_without_a_format_are_counted(models: tuple[Path, Path], tmp_path: Path) -> None:
    """They have no type in common with others."""
    other = tmp_path / "other"
    shutil.copytree(models[0], other)
    stored = stock.tensors(other)
    norm = stored["model.norm.weight"]
    stored["model.norm.weight"] = norm.to(torch.float8_e4m3fn)
    save_file(stored, other / "model.safetensors", metadata={"format": "pt"})
    found = diff(models[0], other, RUN)
    assert isinstance(found, ModelDiff)
    moved = {one.name: one.moved for one in found.tensors}
    wanted = (stored["model.norm.weight"].double() != norm.double()).double().mean()
    assert moved["model.norm.weight"] == pytest.approx(float(wanted))


def test_other_settings_are_named(models: tuple[Path, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(models[1], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    said: list[str] = []
    diff(*models, Run(device="cpu", threads=1, notify=said.append))
    assert said == []
    diff(models[0], other, Run(device="cpu", threads=1, notify=said.append))
    assert ["differ in rms_norm_eps" in one for one in said] == [True]
