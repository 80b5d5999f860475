"""The singular values of an adapter's factors: of its slice, of the change by training, and by rank.

Everything is computed from the factors; no weight of the model is read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from svdconvert.config.progress import report
from svdconvert.errors import ChangedError, SvdConvertError
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.grids import place_of
from svdconvert.inputs.open_adapter import open_adapter_delta
from svdconvert.linalg.delta import Product
from svdconvert.linalg.low_rank import singular_values
from svdconvert.pipeline.merge import adapter_product, module_update

Spectrum = Sequence[float]
_MOST_RANKS = 512


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """Singular values by role, and what a truncation of the change loses."""

    adapter: Mapping[str, Sequence[Spectrum]] = field(default_factory=dict)
    """Role -> descending singular values of s B A before training, one list for each matrix."""
    change: Mapping[str, Sequence[Spectrum]] = field(default_factory=dict)
    """The same of the change by training, s B A - s0 B0 A0; empty for an untrained adapter."""
    truncation: Sequence[tuple[int, float]] = ()
    """(rank of every matrix, ||change - kept||_F / ||change||_F over all matrices)."""
    remarks: tuple[str, ...] = ()
    """Sentences about what the files do not allow to compute."""


def measure_spectra(directory: Path) -> Spectra:
    """The spectra of a directory with an adapter; a remark instead if its files do not suffice.

    Raises ChangedError if a factor is not the one that the manifest lists.
    """
    try:
        delta = open_adapter_delta(directory)
        return _measure(delta)
    except ChangedError:
        raise
    except SvdConvertError as error:
        return Spectra(remarks=(f"no singular values: {error}",))


def _measure(delta: AdapterDelta) -> Spectra:
    if delta.is_lost:
        found = _by_role(delta, adapter_product)
        missing = (
            "its initial adapter is not here: only the spectra of its factors are known, not of the change"
        )
        return Spectra(adapter=found, remarks=(missing,))
    start = {} if delta.initial_adapter is None else _by_role(delta, _initial_product)
    if delta.initial_adapter is delta.adapter:
        return Spectra(adapter=start)
    change = _by_role(delta, module_update)
    sigmas = [sigma for members in change.values() for sigma in members]
    if not any(any(sigma) for sigma in sigmas):
        return Spectra(adapter=start)
    remarks = ("it is not recorded how it started: zero is assumed",) if delta.is_assumed_zero else ()
    return Spectra(adapter=start, change=change, truncation=_truncation(sigmas), remarks=remarks)


def _initial_product(delta: AdapterDelta, module: str) -> Product:
    factors, scale = delta.initial(module)
    left, right = factors.folded()
    return left * scale, right


def _by_role(
    delta: AdapterDelta, product_of: Callable[[AdapterDelta, str], Product]
) -> dict[str, list[Spectrum]]:
    """Role -> the singular values of every matrix, those that are zero left out."""
    found: dict[str, list[Spectrum]] = {}
    modules = delta.modules
    for number, module in enumerate(modules, start=1):
        left, right = product_of(delta, module)
        sigma = singular_values(left.double(), right.double())
        floor = float(sigma[0]) * torch.finfo(torch.float32).eps if len(sigma) else 0.0
        place = place_of(module)
        role = place[1] if place else module.rpartition(".")[2]
        found.setdefault(role, []).append([value for value in sigma.tolist() if value > floor])
        report(None, number, len(modules), "matrices", name=module)
    return found


def _truncation(sigmas: Sequence[Spectrum]) -> list[tuple[int, float]]:
    """The relative error of keeping r singular values of every matrix, for all r up to the largest rank."""
    longest = min(max(map(len, sigmas)), _MOST_RANKS)
    squares = [0.0] * (longest + 1)
    for sigma in sigmas:
        for number, value in enumerate(sigma):
            squares[min(number, longest)] += value**2
    total = sum(squares)
    tail = total
    curve = [(0, 1.0)]
    for rank, square in enumerate(squares[:-1], start=1):
        tail = max(tail - square, 0.0)
        curve.append((rank, (tail / total) ** 0.5))
    return curve
