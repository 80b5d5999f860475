"""Checkpoints merged into one, against float64 references and against mergekit if it is installed."""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from svdconvert import CombineOptions, Run, combine, read_manifest
from svdconvert.errors import ArtifactError, RecipeError, UnknownNameError
from svdconvert.merging.base import MERGES
from svdconvert.publish.command_line import command_of
from tests import rwkv6
from tests.conftest import Build
from tests.merging.mergekit import PROGRAM, run_mergekit
from tests.stock import logits, plain, same_bytes, tensors
from tests.tiny import SHARDED

RUN = Run(threads=1)
Models = dict[str, Path]


def variant(base: Path, out: Path, seed: int, amount: float = 0.05) -> Path:
    """A model like `base` as if fine-tuned: every tensor has changed."""
    random = torch.Generator().manual_seed(seed)
    model = plain(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=random))
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def models(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> Models:
    home = tmp_path_factory.mktemp("models")
    base = checkpoint("llama", dtype=torch.float32, tied=False)
    return {"base": base} | {name: variant(base, home / name, seed) for seed, name in enumerate("abc", 1)}


def as_file(content: Mapping[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(dict(content)))
    return path


def merged(content: Mapping[str, Any], home: Path, **given: Any) -> dict[str, Tensor]:
    home.mkdir(exist_ok=True)
    combine([], home / "out", CombineOptions(**given), RUN, config=as_file(content, home / "merge.yaml"))
    return tensors(home / "out")


def file_of(models: Models, method: str, base: str | None, **parameters: Any) -> dict[str, Any]:
    """A file for the models a, b and c, with weights of their own if the method has some."""
    weights = {"a": 0.5, "b": -0.3, "c": 0.8}
    has_weights = MERGES.get(method.replace("_", "-")).parameter("weight") is not None
    each = [
        {"model": str(models[name]), **({"parameters": {"weight": weight}} if has_weights else {})}
        for name, weight in weights.items()
    ]
    return {
        "merge_method": method,
        "models": each,
        **({"base_model": str(models[base])} if base else {}),
        "parameters": parameters,
        "dtype": "float32",
    }


FILES: dict[str, Callable[[Models], dict[str, Any]]] = {
    "linear": lambda models: file_of(models, "linear", None),
    "linear without normalize": lambda models: file_of(models, "linear", None, normalize=False),
    "task_arithmetic": lambda models: file_of(models, "task_arithmetic", "base"),
    "task_arithmetic with lambda": lambda models: file_of(
        models, "task_arithmetic", "base", normalize=True, **{"lambda": 0.7}
    ),
    "ties": lambda models: file_of(models, "ties", "base", density=0.4, int8_mask=True),
    "ties with conditions": lambda models: file_of(
        models,
        "ties",
        "base",
        density=[
            {"filter": "mlp", "value": [0.2, 0.9]},
            {"filter": "self_attn", "value": 0.3},
            {"value": 0.7},
        ],
        rescale=True,
        normalize=False,
    ),
    "breadcrumbs": lambda models: file_of(models, "breadcrumbs", "base", density=0.7, gamma=0.05),
    "breadcrumbs_ties": lambda models: file_of(models, "breadcrumbs_ties", "base", density=0.9, gamma=0.2),
    "sce": lambda models: file_of(models, "sce", "base", select_topk=0.4),
    "model_stock": lambda models: file_of(models, "model_stock", "base"),
    "model_stock by rows": lambda models: file_of(models, "model_stock", "base", filter_wise=True),
    "slerp with gradients": lambda models: {
        "merge_method": "slerp",
        "base_model": str(models["a"]),
        "slices": [
            {"sources": [{"model": str(models[name]), "layer_range": [0, 2]} for name in ("a", "b")]},
        ],
        "parameters": {"t": [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.3}]},
        "dtype": "float32",
    },
    "passthrough": lambda models: {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(models["a"]), "layer_range": [0, 2]}]},
            {
                "sources": [
                    {"model": str(models["b"]), "layer_range": [0, 1], "parameters": {"scale": 0.5}},
                ]
            },
            {"sources": [{"model": str(models["c"]), "layer_range": [0, 2]}]},
        ],
        "dtype": "float32",
    },
    "task arithmetic of slices": lambda models: {
        "merge_method": "task_arithmetic",
        "base_model": str(models["base"]),
        "slices": [
            {
                "sources": [
                    {"model": str(models["a"]), "layer_range": [1, 2], "parameters": {"weight": 0.4}},
                    {"model": str(models["base"]), "layer_range": [0, 1]},
                ]
            },
            {
                "sources": [
                    {"model": str(models["b"]), "layer_range": [0, 2], "parameters": {"weight": [0.1, 0.6]}},
                    {"model": str(models["base"]), "layer_range": [0, 2]},
                ]
            },
        ],
        "dtype": "float32",
    },
}


@pytest.mark.skipif(PROGRAM is None, reason="mergekit is not installed")
@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_what_mergekit_gives(name: str, models: Models, tmp_path: Path) -> None:
    content = FILES[name](models)
    found = merged(content, tmp_path)
    expected = tensors(run_mergekit(content, tmp_path / "theirs"))
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert torch.allclose(found[tensor], value, rtol=1e-6, atol=1e-6), tensor
    ours, theirs = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("out", "theirs"))
    assert ours["num_hidden_layers"] == theirs["num_hidden_layers"]


@pytest.mark.skipif(PROGRAM is None, reason="mergekit is not installed")
@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_a_random_merge_has_the_distribution_of_mergekit(method: str, models: Models, tmp_path: Path) -> None:
    """The size of the whole change, and the share of entries that changed, are those of mergekit."""
    content = file_of(models, method, "base", density=0.6)
    start = tensors(models["base"])

    def figures(found: Mapping[str, Tensor]) -> tuple[float, float]:
        changes = torch.cat(
            [(found[name] - value).reshape(-1) for name, value in start.items() if value.dim() == 2]
        )
        return float(changes.norm()), float((changes.abs() > 1e-6).double().mean())

    ours = figures(merged(content, tmp_path, seed=3))
    theirs = figures(tensors(run_mergekit(content, tmp_path / "theirs", "--random-seed", "5")))
    assert ours == pytest.approx(theirs, rel=0.02)


def dense(models: Models, weights: Sequence[float]) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """Tensor -> (base, weighted changes) in float64."""
    base, *others = [tensors(models[name]) for name in ("base", "a", "b", "c")]
    return {
        name: (
            value.double(),
            [
                weight * (other[name].double() - value.double())
                for weight, other in zip(weights, others, strict=True)
            ],
        )
        for name, value in base.items()
    }


@pytest.mark.parametrize("method", ["tsv", "iso-c", "low-rank"])
def test_a_spectral_merge_is_that_of_float64(method: str, models: Models, tmp_path: Path) -> None:
    weights = (0.5, 0.3, 0.8)
    rank = {"rank": 5} if method == "low-rank" else {}
    options = CombineOptions(method=method, weights=weights, **rank)
    combine([models[name] for name in "abc"], tmp_path / "out", options, RUN, base=str(models["base"]))
    found = tensors(tmp_path / "out")
    for name, (base, changes) in dense(models, weights).items():
        if base.dim() == 1:
            expected = sum(changes) / (1 if method == "low-rank" else 3)
        elif method == "iso-c":
            u, s, v = torch.linalg.svd(sum(changes), full_matrices=False)
            expected = s.mean() * u @ v
        else:
            kept = 5 if method == "low-rank" else min(base.shape) // 3
            parts = [torch.linalg.svd(change, full_matrices=False) for change in changes]
            if method == "low-rank":
                expected = sum((u[:, :kept] * s[:kept]) @ v[:kept] for u, s, v in parts)
            else:
                p, _, q = torch.linalg.svd(
                    torch.cat([u[:, :kept] for u, _, _ in parts], 1), full_matrices=False
                )
                x, _, y = torch.linalg.svd(torch.cat([v[:kept] for _, _, v in parts]), full_matrices=False)
                expected = p @ q @ torch.diag(torch.cat([s[:kept] for _, s, _ in parts])) @ x @ y
        error = torch.linalg.norm(found[name].double() - base - expected)
        assert error < 1e-4 * torch.linalg.norm(expected), name


def test_the_command_line_and_a_file_give_the_same_bytes(models: Models, tmp_path: Path) -> None:
    options = CombineOptions(method="dare-ties", weights=(0.5, -0.3, 0.8), density=0.4, seed=2)
    combine([models[name] for name in "abc"], tmp_path / "typed", options, RUN, base=str(models["base"]))
    found = merged(file_of(models, "dare_ties", "base", density=0.4), tmp_path, seed=2)
    assert same_bytes(tensors(tmp_path / "typed"), found)


def test_other_spellings_of_a_file_mean_the_same(models: Models, tmp_path: Path) -> None:
    content = file_of(models, "dare-linear", "base", density=0.5, normalize=False)
    spelled = content | {
        "merge_method": "dare_linear",
        "parameters": content["parameters"] | {"normalize": 0},
    }
    spelled["base_model"] = {"model": {"path": content["base_model"], "revision": None}, "lora": None}
    spelled["models"] = [one | {"model": {"model": {"path": one["model"]}}} for one in content["models"]]
    one, two = (merged(given, tmp_path / str(n)) for n, given in enumerate((content, spelled)))
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_a_merge_is_rounded_once_and_says_what_rounding_keeps(checkpoint: Build, tmp_path: Path) -> None:
    base = checkpoint("llama", tied=False, shard=SHARDED)
    others = [variant(base, tmp_path / name, seed, 0.01) for seed, name in enumerate("ab")]
    options = CombineOptions(method="task-arithmetic", weights=(0.3, 0.4), max_shard_size="8KB")
    manifest = combine(others, tmp_path / "out", options, RUN, base=str(base))
    start, found = tensors(base), tensors(tmp_path / "out")
    changes = [tensors(other) for other in others]
    for name, value in start.items():
        exact = value.float() + (
            0.3 * (changes[0][name].float() - value.float())
            + 0.4 * (changes[1][name].float() - value.float())
        )
        assert found[name].dtype == torch.bfloat16
        assert torch.allclose(found[name].float(), exact, rtol=2**-8, atol=1e-8)
    update = manifest.result.update
    assert 0.9 < update.cosine < 1.0 and len(update.matrices) == len(start)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert read_manifest(tmp_path / "out").command == "combine"
    words = command_of(manifest, "me/mine")
    assert words == (
        f"svdconvert combine a b --base {base.name} --method task-arithmetic --weights 0.3,0.4 "
        "--max-shard-size 8KB -o mine --push me/mine"
    )
    logits(plain(tmp_path / "out"))


def test_layers_of_two_models_make_a_deeper_one(models: Models, tmp_path: Path) -> None:
    found = merged(FILES["passthrough"](models), tmp_path)
    a, b, c = (tensors(models[name]) for name in "abc")
    key = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(found[key.format(1)], a[key.format(1)])
    assert torch.equal(found[key.format(2)], 0.5 * b[key.format(0)])
    assert torch.equal(found[key.format(4)], c[key.format(1)])
    assert torch.equal(found["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(found["model.norm.weight"], c["model.norm.weight"])
    model = plain(tmp_path / "out")
    assert model.config.num_hidden_layers == 5
    assert logits(model).isfinite().all()


def test_a_base_of_slices_that_are_passed_through_only_gives_its_sidecars(
    models: Models, tmp_path: Path
) -> None:
    content = FILES["passthrough"](models)
    merged(content | {"base_model": str(models["base"])}, tmp_path / "with")
    merged(content, tmp_path / "without")
    assert same_bytes(tensors(tmp_path / "with" / "out"), tensors(tmp_path / "without" / "out"))


def test_slices_of_changes_name_the_layers_of_the_base(models: Models, tmp_path: Path) -> None:
    content = FILES["task arithmetic of slices"](models)
    content["slices"][0]["sources"].pop()
    with pytest.raises(RecipeError, match="add the base to its sources"):
        merged(content, tmp_path)


def test_any_family_is_merged(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=16)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    manifest = combine([tmp_path / "a", tmp_path / "b"], tmp_path / "out", run=RUN)
    assert manifest.layout == "auto"
    a, b, found = (tensors(tmp_path / name) for name in ("a", "b", "out"))
    assert all(torch.allclose(found[name], (a[name] + b[name]) / 2, atol=1e-7) for name in a)


def test_two_pth_files_of_rwkv_become_a_third(tmp_path: Path) -> None:
    model = rwkv6.random_model(layers=1, width=32, head=16)
    other = OrderedDict((name, 0.5 * value.flip(-1)) for name, value in model.items())
    paths = [rwkv6.save(model, tmp_path / "one.pth"), rwkv6.save(other, tmp_path / "two.pth")]
    manifest = combine(paths, tmp_path / "out", CombineOptions(weights=(3, 1)), RUN)
    (file,) = manifest.files
    assert file.endswith(".pth")
    first, second, found = (torch.load(path) for path in (*paths, tmp_path / "out" / file))
    assert found.keys() == first.keys()
    for name, value in found.items():
        expected = 0.75 * first[name].float() + 0.25 * second[name].float()
        assert torch.allclose(value.float(), expected, rtol=2**-8, atol=1e-6), name


def test_a_tied_head_is_merged_with_one_that_is_not(
    checkpoint: Build, models: Models, tmp_path: Path
) -> None:
    tied = checkpoint("llama", dtype=torch.float32, tied=True)
    found = merged(file_of(models | {"b": tied}, "linear", None), tmp_path)
    head = tensors(tied)["model.embed_tokens.weight"]
    expected = (
        0.5 * tensors(models["a"])["lm_head.weight"]
        - 0.3 * head
        + 0.8 * tensors(models["c"])["lm_head.weight"]
    )
    assert torch.allclose(found["lm_head.weight"], expected, atol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"models": [], "merge_methud": "ties"}, "merge_methud"),
    "a key of mergekit": ({"merge_method": "ties", "tokenizer": {}}, "tokenizer is not supported"),
    "another tokenizer": ({"tokenizer_source": "union"}, "tokenizer_source is 'union'"),
    "a template": ({"chat_template": "chatml"}, "chat_template is 'chatml'"),
    "float64": ({"dtype": "float64"}, "dtype is 'float64'"),
    "an unknown parameter": ({"parameters": {"temperature": 1}}, "parameter 'temperature'"),
    "a wrong value": ({"parameters": {"density": 2}}, "density is 2, which must be from 0 to 1"),
    "no number": ({"parameters": {"density": "much"}}, "density is 'much', which must be a number"),
    "no method": ({"merge_method": "tise"}, "did you mean ties"),
    "no base": ({"base_model": None}, "merges changes of a base"),
    "a LoRA of a model": ({"base_model": {"lora": {"path": "b"}}}, "has the key 'lora'"),
    "both": ({"slices": []}, "give either models or slices"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_with_what_is_not_supported_is_refused(case: str, models: Models, tmp_path: Path) -> None:
    changed, message = REFUSED[case]
    content = file_of(models, "ties", "base") | changed
    with pytest.raises((RecipeError, UnknownNameError), match=message):
        merged(content, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_missing_weight_is_refused_as_mergekit_does(models: Models, tmp_path: Path) -> None:
    content = file_of(models, "ties", "base")
    del content["models"][1]["parameters"]
    with pytest.raises(RecipeError, match=r"gives no weight for model"):
        merged(content, tmp_path)


def test_models_that_do_not_fit_are_refused(models: Models, checkpoint: Build, tmp_path: Path) -> None:
    other = checkpoint("qwen2")
    with pytest.raises(ArtifactError, match="a llama and .* a qwen2"):
        combine([models["a"], other], tmp_path / "out", run=RUN)
    model = tensors(models["a"])
    wide = tmp_path / "wide"
    wide.mkdir()
    (wide / "config.json").write_text((models["a"] / "config.json").read_text())
    model["model.embed_tokens.weight"] = torch.zeros(70, 32)
    save_file(model, wide / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"\(70, 32\).*one vocabulary"):
        combine([models["a"], wide], tmp_path / "out", run=RUN)
    for given, message in (
        ({"method": "ties"}, "give it with --base"),
        ({"method": "slerp"}, "exactly 1|at most 1|give it with --base|slerp merges"),
        ({"tol": 0.1}, "--tol changes nothing"),
        ({"method": "knots"}, "does not merge checkpoints"),
    ):
        with pytest.raises(RecipeError, match=message):
            combine([models["a"], models["b"]], tmp_path / "out", CombineOptions(**given), RUN)
    with pytest.raises(RecipeError, match="linear has no base"):
        combine([models["a"], models["b"]], tmp_path / "out", run=RUN, base=str(models["base"]))
