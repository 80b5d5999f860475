"""The names at run time of a model's tensors, and which rows of which tensors a module's matrix is."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from svdconvert.checkpoint.parts import part_name
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource
from svdconvert.layouts.base import Layout, Slot
from svdconvert.linalg.delta import Product
from svdconvert.manifest.place import Rows
from svdconvert.quantization.view import read_to_compute

# Modules that only contain the body of a model: versions of transformers, and a body that is saved without
# its head, differ in them.
_CONTAINERS = re.compile(r"^(?:(?:model|language_model|text_model)\.)+")


@dataclass(frozen=True, slots=True)
class Share:
    """A tensor, or a part of one, that has rows of a module's matrix."""

    tensor: str
    of_module: Rows | None = None
    """Which rows of the module's matrix it has; None if it has all."""
    of_tensor: Rows | None = None
    """Which of its rows these are; None if all are. Rows are out features, also if it is transposed."""
    transposed: bool = False
    """True if the files have it as (in, out)."""


Shares = Mapping[str, Sequence[Share]]
"""Module -> the tensors that make up its matrix."""


@dataclass(frozen=True)
class TensorNames:
    """The names at run time of a model's tensors."""

    layout: Layout
    infos: Mapping[str, TensorInfo]
    """Those of the divided source."""

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """The matrices of the layout."""
        return self.layout.slots(self.infos)

    @cached_property
    def _exact(self) -> dict[str, str]:
        names = {self.layout.runtime_name(name): name for name in self.infos}
        # An adapter made for another layout of a family has the names of the family's network.
        if self.layout.family is not None:
            names |= {f"{self.layout.network_path(name)}.weight": name for name in self.slots}
        return names | {f"{slot.module}.weight": name for name, slot in self.slots.items()}

    @cached_property
    def _without_containers(self) -> dict[str, str]:
        """As `_exact`, without containers; names that are the same without them are left out."""
        found: dict[str, set[str]] = {}
        for parameter, name in self._exact.items():
            found.setdefault(without_containers(parameter), set()).add(name)
        return {parameter: min(names) for parameter, names in found.items() if len(names) == 1}

    @cached_property
    def _placed(self) -> dict[str, list[Share]]:
        """Module, without containers -> shares, for the slots that are no whole weight of a module."""
        found: dict[str, list[Share]] = {}
        for name, slot in self.slots.items():
            for module, share in _shares(slot, self.infos[name].shape):
                shares = found.setdefault(without_containers(module), [])
                if share not in shares:
                    shares.append(share)
        return found

    def tensor(self, parameter: str) -> str | None:
        """The tensor that is the parameter with this name at run time; None if there is none."""
        return self._exact.get(parameter) or self._without_containers.get(without_containers(parameter))

    def shares(self, module: str) -> Sequence[Share]:
        """The tensors that make up the matrix of a module; empty if there are none."""
        if shares := self._placed.get(without_containers(module)):
            return shares
        tensor = self.tensor(f"{module}.weight")
        return () if tensor is None else (Share(tensor),)


def _shares(slot: Slot, shape: tuple[int, ...]) -> Iterator[tuple[str, Share]]:
    """(module, share) for every name that an adapter may have for a slot, or for a part of it."""
    place = slot.place
    if place is None:
        return
    whole = Share(slot.name, place.rows, transposed=place.transposed)
    if place.expert is None:
        yield place.parameter.removesuffix(".weight"), whole
        return
    yield part_name(place.parameter, place.expert), whole
    rows = shape[1] if place.transposed else shape[0]
    for holder in (slot.module.rpartition(".")[0], f"{place.module}.{place.expert}"):
        if not place.projections:
            yield f"{holder}.{slot.module.rpartition('.')[2]}", replace(whole, of_module=None)
        for number, projection in enumerate(place.projections):
            part = Share(slot.name, of_tensor=place.rows_of(number, rows), transposed=place.transposed)
            yield f"{holder}.{projection}", part


def shape_of_shares(infos: Mapping[str, TensorInfo], shares: Sequence[Share]) -> tuple[int, int]:
    """(O, I) of the matrix of a module that these tensors make up."""
    rows = 0
    for share in shares:
        shape = infos[share.tensor].shape
        shape = shape[::-1] if share.transposed else shape
        count = share.of_tensor.size if share.of_tensor else shape[0]
        rows = max(rows, share.of_module.slice.stop if share.of_module else count)
    return rows, shape[1]


def read_matrix(source: TensorSource, shares: Sequence[Share]) -> Tensor:
    """The matrix (out, in) of a module, in the dtype of its first tensor; float32 if that is quantised."""
    parts = []
    for share in shares:
        stored = read_to_compute(source, share.tensor)
        matrix_OI = stored.T if share.transposed else stored
        parts.append(matrix_OI if share.of_tensor is None else matrix_OI[share.of_tensor.slice])
    if len(shares) == 1 and shares[0].of_module is None:
        return parts[0].contiguous()
    places = [share.of_module or Rows(0, len(part)) for share, part in zip(shares, parts, strict=True)]
    whole_OI = parts[0].new_zeros(max(rows.slice.stop for rows in places), parts[0].shape[1])
    for rows, part in zip(places, parts, strict=True):
        whole_OI[rows.slice] = part.to(whole_OI.dtype)
    return whole_OI


def joined_product(products: Sequence[tuple[Product, Share]], rows: int) -> Product:
    """(left, right) whose product is the change of a tensor with `rows` out features, as it is stored.

    `products` are those of the modules whose matrices have a share of the tensor.
    """
    first = products[0][1]
    if len(products) == 1 and first.of_module is first.of_tensor is None:
        left, right = products[0][0]
    else:
        width = sum(part.shape[1] for (part, _), _ in products)
        left = products[0][0][0].new_zeros(rows, width)
        start = 0
        for (part, _), share in products:
            columns = slice(start, start := start + part.shape[1])
            own = part if share.of_module is None else part[share.of_module.slice]
            left[(share.of_tensor or Rows(0, rows)).slice, columns] = own
        right = torch.cat([part for (_, part), _ in products])
    return (right.T, left.T) if first.transposed else (left, right)


def without_containers(parameter: str) -> str:
    """The name without the modules that only contain a model's body, which versions of a model differ in."""
    return _CONTAINERS.sub("", parameter)
