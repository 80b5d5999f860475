"""train --plan: what a run would read, train, write and need. Reads headers and rows, loads no weights."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from time import perf_counter
from typing import Any

import torch

from svdconvert.config.train import TrainOptions
from svdconvert.pipeline.estimate import copy_seconds
from svdconvert.training.data.dataset import DataSplits, TrainingData
from svdconvert.training.data.example import Example
from svdconvert.training.model.extra_parameters import ParameterShapes
from svdconvert.training.outline import Outline

_SHARE = 0.4  # of the speed of a large product, that a whole step reaches
_START_SECONDS = 12.0  # to import the other libraries and to build the network
_PROCESS = 700_000_000  # bytes of the process with torch and transformers, before it loads a model
_OPTIMIZER = 16  # bytes of a trained float32 value, its gradient and AdamW's two moments
_ACTIVATIONS = 1.5  # copies of the inputs and outputs of all matrices that the backward pass needs
_EMBEDDING = re.compile(r"(^|\.)(embed\w*|\w*embeddings|wte|wpe|emb)\.weight$")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True)
class TrainEstimate:
    """What a run would do. Sizes in bytes, time in seconds, shares as fractions of 1."""

    rows: int
    """Training rows; packed ones count as one."""
    held_out_rows: int
    steps: int
    epochs: float
    tokens: int
    """Of all training steps together, without padding."""
    longest_row: int
    """Tokens, before it is cut."""
    cut: float
    """Share of all rows that are cut."""
    left_out: float
    """Share of all rows that are left out."""
    lr: float
    trained_parameters: int
    parameters: int
    """Of the model that is loaded."""
    written: int
    files: int
    """Files of weights."""
    checkpoints: int
    """Bytes of the checkpoints that exist at the same time, which are deleted at the end."""
    memory: int
    device: str
    precision: str
    seconds: float
    basis: str
    """What the time and the memory are estimated from."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What computes, and how many processes share the rows."""

    device: torch.device
    precision: str
    """bf16, fp16 or fp32."""
    processes: int = 1


def estimate_training(
    outline: Outline,
    options: TrainOptions,
    data: TrainingData,
    also: ParameterShapes,
    machine: Machine,
) -> TrainEstimate:
    """Estimate a run: counts are exact, memory and time approximate. `also` are trained in full.

    `options` have all defaults resolved.
    """
    splits = data.splits
    steps = options.total_steps(len(splits.train), machine.processes)
    epochs = steps / options.steps_per_epoch(len(splits.train), machine.processes)
    tokens = round(epochs * _tokens(splits.train))
    extra = sum(map(prod, also.values()))
    trained = outline.trained_values + extra
    full = outline.method.split is None
    speed = _flops_per_second(machine)
    work = _work(outline, options, splits, tokens, steps, trained)
    reading = copy_seconds(2 * outline.stored_bytes)
    adapter = outline.adapter_values * (4 + outline.width) + 4 * extra
    return TrainEstimate(
        rows=len(splits.train),
        held_out_rows=len(splits.held_out),
        steps=steps,
        epochs=epochs,
        tokens=tokens,
        longest_row=splits.counts.longest,
        cut=splits.counts.cut / max(splits.counts.read, 1),
        left_out=splits.counts.left_out / max(splits.counts.read, 1),
        lr=options.lr or 0.0,
        trained_parameters=trained,
        parameters=outline.values,
        written=outline.stored_bytes if full else adapter,
        files=1 if full else 2,
        checkpoints=_checkpoints(options, steps) * 12 * trained,
        memory=_PROCESS + _memory(outline, options, splits, trained, machine),
        device=str(machine.device),
        precision=machine.precision,
        seconds=_START_SECONDS + reading + outline.seconds + work / (_SHARE * speed),
        basis=(
            f"{work / 1e12:.3g} TFLOP at {_SHARE:.0%} of {speed / 1e9:.4g} GFLOP/s, which a product of two "
            f"matrices reaches now in {machine.precision} on {machine.device}"
        ),
    )


def _tokens(examples: Iterable[Example]) -> int:
    return sum(len(example.input_ids) for example in examples)


def _checkpoints(options: TrainOptions, steps: int) -> int:
    return min(options.save_limit, steps // options.save_every)


def _work(  # noqa: PLR0913 (the factors of one product)
    outline: Outline, options: TrainOptions, splits: DataSplits, tokens: int, steps: int, trained: int
) -> float:
    """Floating-point operations of a run: 2 per weight and token forward, and as many for each gradient."""
    weights = _multiplied(outline)
    passes = 2 + (1 if options.gradient_checkpointing else 0)
    measured = 2 + (steps - 1) // options.eval_every if options.eval_every else 2
    held_out = _tokens(splits.held_out) * (measured if splits.held_out else 0)
    of_factors = 0 if outline.method.split is None else 2 * passes * trained
    of_steps = 2 * passes * weights + of_factors + 2 * (weights if not of_factors else trained)
    return float(tokens * of_steps + held_out * 2 * weights)


def _multiplied(outline: Outline) -> float:
    """Weights that a token is multiplied with: no table that is only looked up, and only its own experts."""
    config = _text_config(outline.model.config)
    matrices = {name: prod(info.shape) for name, info in outline.infos.items() if len(info.shape) > 1}
    has_head = any("head" in name for name in matrices)
    known = next((config[key] for key in _EXPERTS if isinstance(config.get(key), int)), 0)
    used = config.get("num_experts_per_tok")
    share = used / known if known and isinstance(used, int) else 1.0
    return sum(
        count * (share if "experts." in name else 1.0)
        for name, count in matrices.items()
        if not (has_head and _EMBEDDING.search(name))
    )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _memory(
    outline: Outline, options: TrainOptions, splits: DataSplits, trained: int, machine: Machine
) -> int:
    """The larger of two peaks: while the model is loaded, and in a step with the longest rows."""
    width = 4 if machine.precision == "fp32" else 2
    full = outline.method.split is None
    loaded = outline.stored_bytes
    if (full or machine.precision == "fp32") and not outline.model.is_decoded:
        loaded = 4 * outline.values
    longest = max((len(example.input_ids) for example in splits.all), default=0)
    tokens = longest * options.batch_size
    sides = [sum(info.shape[-2:]) for info in outline.infos.values() if len(info.shape) == 2]  # noqa: PLR2004
    saved = sum(sides) * (0.2 if options.gradient_checkpointing else 1.0)
    step = tokens * saved * width * _ACTIVATIONS
    optimizer = (_OPTIMIZER - 4 if full else _OPTIMIZER) * trained
    return loaded + max(outline.split_bytes, ceil(step) + optimizer)


def _flops_per_second(machine: Machine) -> float:
    """Measured as the fastest of five products of square matrices."""
    size = 1024 if machine.device.type == "cpu" else 4096
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(machine.precision, torch.float32)
    matrix = torch.ones(size, size, dtype=dtype, device=machine.device)
    seconds = []
    for _ in range(5):
        _wait_for(machine.device)
        start = perf_counter()
        matrix @ matrix
        _wait_for(machine.device)
        seconds.append(perf_counter() - start)
    return 2.0 * size**3 / min(seconds)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
