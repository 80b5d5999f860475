"""Checkpoints merged in blocks of entries, against float64 references."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from svdconvert import CombineOptions, Run, combine
from svdconvert.merging.base import CHECKPOINTS, MERGES
from svdconvert.pipeline import combine_checkpoints
from tests.conftest import Build
from tests.stock import tensors

RUN = Run(threads=1)
WEIGHTS = (0.7, -0.2)
Merge = Callable[[np.ndarray, Sequence[np.ndarray]], np.ndarray]


def linear(base: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    return sum(weight * other for weight, other in zip(WEIGHTS, others, strict=True)) / sum(WEIGHTS)


def task_arithmetic(base: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    return base + sum(weight * (other - base) for weight, other in zip(WEIGHTS, others, strict=True))


def slerp(base: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    t, other = 0.3, others[0]
    cosine = np.vdot(base, other) / np.linalg.norm(base) / np.linalg.norm(other)
    if abs(cosine) > 0.9995:
        return (1 - t) * base + t * other
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * base + np.sin(t * angle) * other) / np.sin(angle)


def ties(base: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    kept = []
    for other in others:
        change = other - base
        least = np.sort(np.abs(change).ravel())[-int(0.5 * change.size)]
        kept.append(np.where(np.abs(change) >= least, change, 0.0))
    weighted = np.stack([weight * change for weight, change in zip(WEIGHTS, kept, strict=True)])
    agrees = np.sign(weighted) == np.where(weighted.sum(axis=0) >= 0, 1.0, -1.0)
    divisor = (agrees * np.reshape(WEIGHTS, (2, *[1] * base.ndim))).sum(axis=0)
    divisor[divisor == 0] = 1.0
    return base + (weighted * agrees).sum(axis=0) / divisor


def model_stock(base: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    first, second = (other - base for other in others)
    cosine = np.vdot(first, second) / np.linalg.norm(first) / np.linalg.norm(second)
    return base + (first + second) * cosine / (1 + cosine)


def breadcrumbs(base: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    merged = base.copy()
    for weight, other in zip(WEIGHTS, others, strict=True):
        change = other - base
        order = np.argsort(-np.abs(change).ravel(), kind="stable")
        kept = np.zeros(change.size)
        first = int(0.1 * change.size)
        kept[order[first : first + int(0.5 * change.size)]] = 1.0
        merged += weight * change * kept.reshape(base.shape)
    return merged


def sce(base: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    changes = np.stack([other - base for other in others])
    variance = changes.var(axis=0)
    order = np.argsort(-variance.ravel(), kind="stable")[: int(0.4 * np.count_nonzero(variance))]
    kept = np.zeros(base.size)
    kept[order] = 1.0
    changes = changes * kept.reshape(base.shape)
    energies = (changes**2).reshape(2, -1).mean(axis=1)
    agrees = np.sign(changes) == np.where(changes.sum(axis=0) >= 0, 1.0, -1.0)
    shares = agrees * (energies / energies.sum()).reshape(2, *[1] * base.ndim)
    return base + (changes * shares).sum(axis=0) / np.maximum(shares.sum(axis=0), 1e-6)


CASES: dict[str, tuple[Merge, dict[str, Any], int, bool]] = {
    "linear": (linear, {"weights": WEIGHTS}, 2, False),
    "task-arithmetic": (task_arithmetic, {"weights": WEIGHTS}, 2, True),
    "slerp": (slerp, {"set": {"t": 0.3}}, 1, True),
    "ties": (ties, {"weights": WEIGHTS, "density": 0.5}, 2, True),
    "model-stock": (model_stock, {}, 2, True),
    "breadcrumbs": (breadcrumbs, {"weights": WEIGHTS, "density": 0.5, "set": {"gamma": 0.1}}, 2, True),
    "sce": (sce, {"set": {"select_topk": 0.4}}, 2, True),
}


def changed(base: Path, out: Path, seed: int) -> Path:
    """A model like the base, with every entry moved by about half of its size."""
    random = torch.Generator().manual_seed(seed)
    out.mkdir()
    (out / "config.json").write_text((base / "config.json").read_text())
    stored = load_file(base / "model.safetensors")
    moved = {
        name: one + 0.5 * one.std(correction=0).clamp_min(0.02) * torch.randn(one.shape, generator=random)
        for name, one in stored.items()
    }
    save_file(moved, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("block", [100, 1 << 20])
@pytest.mark.parametrize("method", CASES)
def test_a_merge_is_that_of_float64(
    method: str, block: int, checkpoint: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(combine_checkpoints, "_BLOCK", block)
    reference, given, count, with_base = CASES[method]
    base = checkpoint("llama", dtype=torch.float32, tied=False)
    models = [changed(base, tmp_path / str(number), number) for number in range(count)]
    named = str(base) if with_base else None
    combine(models, tmp_path / "out", CombineOptions(method=method, **given), RUN, base=named)
    start, *others = [tensors(path) for path in (base, *models)]
    found = tensors(tmp_path / "out")
    assert found.keys() == start.keys()
    for name, value in found.items():
        expected = reference(start[name].double().numpy(), [one[name].double().numpy() for one in others])
        assert np.allclose(value.double().numpy(), expected, atol=1e-5), name


@pytest.mark.parametrize("method", [name for name in MERGES.names() if MERGES.get(name).takes >= CHECKPOINTS])
def test_the_result_does_not_depend_on_the_blocks(
    method: str, checkpoint: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoint("llama", dtype=torch.float32, tied=False)
    models = [changed(base, tmp_path / str(number), number) for number in range(MERGES.get(method).most or 2)]
    density = 0.5 if MERGES.get(method).parameter("density") else None
    rank = 3 if method == "low-rank" else None
    named = str(base) if MERGES.get(method).base == "needed" else None
    found = []
    for block in (100, 1 << 20):
        monkeypatch.setattr(combine_checkpoints, "_BLOCK", block)
        out = tmp_path / f"out-{block}"
        combine(models, out, CombineOptions(method=method, density=density, rank=rank), RUN, base=named)
        found.append(tensors(out))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], rtol=1e-6, atol=1e-6), name
