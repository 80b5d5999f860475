"""The layout of a model that nothing is known of but the names and shapes of its tensors."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.errors import TargetError
from svdconvert.layouts.automatic import AutomaticLayout
from svdconvert.layouts.base import BY_NAMES, Slot
from svdconvert.models.roles import ROUTERS, expert_role, role_of, tower_of

_IN_BLOCK = re.compile(r"(?P<before>.*?)\.(?P<layer>[0-9]{1,6})\.(?P<rest>.+)\.weight")
_EXPERT = re.compile(r"(?:.*\.)?experts\.[0-9]{1,6}\.(?P<leaf>[^.]+)")
_MATRIX = 2  # axes
_NO_LINEAR = ("embed", "norm", "conv", "bias")
"""Parts of names of modules whose weights are no linear layers although they may have two axes."""
_SHOWN = 8


def layout_by_names(path: Path, infos: Mapping[str, TensorInfo]) -> AutomaticLayout:
    """Every tensor NAME.weight with two axes in a numbered block is taken for a linear layer (out, in).

    Raises TargetError if the checkpoint in `path` has none.
    """
    table = {slot.name: slot for slot in _slots(infos)}
    if not table:
        raise TargetError(
            f"{path} has no tensor such as layers.0.q_proj.weight, a matrix in a numbered block; layout "
            f"{BY_NAMES} finds nothing to decompose"
        )
    patterns = Counter(
        re.sub(rf"\.{slot.layer}\.", ".{layer}.", slot.name, count=1) for slot in table.values()
    )
    return AutomaticLayout(
        model_types=frozenset(),
        roles={slot.role: slot.name.replace(f".{slot.layer}.", ".{layer}.", 1) for slot in table.values()},
        task=None,
        limits_ranks=True,
        summary="a model known by its tensors' names only",
        table=table,
        assumptions=(
            f"layout {BY_NAMES} assumes that these are linear layers, stored as (out, in), and that their "
            f"modules have the same names: {_listed(list(patterns))}",
        ),
    )


def _slots(infos: Mapping[str, TensorInfo]) -> Iterator[Slot]:
    holders = {name.split(".experts.")[0] for name in infos if ".experts." in name}
    for name, info in infos.items():
        match = _IN_BLOCK.fullmatch(name)
        if match is None or len(info.shape) != _MATRIX or 1 in info.shape:
            continue
        rest = match["rest"]
        parent, _, leaf = f"{match['before']}.{match['layer']}.{rest}".rpartition(".")
        if any(word in leaf.lower() for word in _NO_LINEAR):
            continue
        if leaf.lower() in ROUTERS and any(holder in (parent, f"{parent}.{leaf}") for holder in holders):
            continue
        expert = _EXPERT.fullmatch(rest)
        role = expert_role(expert["leaf"]) if expert else role_of(rest)
        tower = tower_of(match["before"])
        yield Slot(
            name, f"{tower}.{role}" if tower else role, int(match["layer"]), name.removesuffix(".weight")
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
