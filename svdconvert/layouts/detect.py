"""Which layout a checkpoint has: by its tensors' names, else by config.json's model_type, else automatic."""

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.errors import CheckpointError, PluginError, UnknownNameError, brief, did_you_mean
from svdconvert.layouts.base import AUTOMATIC, BY_NAMES, LAYOUTS, KnownUnsupported, Layout

_LONGEST = 100  # characters of a model type that are compared with known ones


def layout_of_model(
    name: str | None,
    path: Path,
    config: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    *,
    trust_remote_code: bool = False,
) -> tuple[str, Layout]:
    """The layout called `name`, else the one that `find_layout` finds, else the automatic one; its name.

    `path`, `config` and `infos` are the model's file or directory, its config.json and its tensors. Raises
    UnknownNameError, PluginError and CheckpointError as `find_layout`, and CheckpointError if the tensors are
    not those of the network that config.json describes.
    """
    if name == BY_NAMES:
        from svdconvert.layouts.by_names import layout_by_names

        return BY_NAMES, layout_by_names(path, infos)
    if name != AUTOMATIC:
        try:
            return find_layout(name, config.get("model_type"), str(path), infos)
        except UnknownNameError as error:
            if name is not None or not config:
                raise UnknownNameError(f"{error}; --layout {BY_NAMES} goes by tensor names alone") from error
            unknown = error
    from svdconvert.layouts.automatic_cache import cached_automatic_layout

    try:
        return AUTOMATIC, cached_automatic_layout(path, config, infos, trust_remote_code=trust_remote_code)
    except UnknownNameError as error:
        if name is not None or "auto_map" in config:
            raise
        raise UnknownNameError(f"{unknown}; --layout {BY_NAMES} goes by tensor names alone") from error


def find_layout(
    name: str | None, model_type: object, directory: str, infos: Container[str] = ()
) -> tuple[str, Layout]:
    """The layout called `name`, else by the tensors `infos`, else by config.json's `model_type`; its name.

    Raises UnknownNameError if there is none, PluginError if `name` is another package's and cannot be
    loaded, and CheckpointError for a model that is known to be unsupported. Plug-ins that cannot be loaded
    are only mentioned if no other layout fits.
    """
    if name is not None:
        return name, LAYOUTS.get(name)
    known, failed = LAYOUTS.load_all()
    for layout in known.values():
        _refuse_unsupported(layout, infos, directory)
    for found, layout in known.items():
        if layout.signature_tensor is not None and layout.signature_tensor in infos:
            return found, layout
    for found, layout in known.items():
        if isinstance(model_type, str) and model_type in layout.model_types:
            return found, layout
    types = sorted(kind for layout in known.values() for kind in layout.model_types)
    similar = did_you_mean(str(model_type)[:_LONGEST], types)
    raise UnknownNameError(
        f"{directory} has the model type {brief(model_type)}, which no layout covers ({similar}); if its "
        f"tensors are named as in {', '.join(known)}, "
        f"give one of them with --layout{_and_failed(failed)}"
    )


def has_signature_tensor(infos: Container[str]) -> bool:
    """True if the tensors' names alone identify a layout, or a model that is known to be unsupported."""
    known, _ = LAYOUTS.load_all()
    return any(
        (layout.signature_tensor is not None and layout.signature_tensor in infos)
        or any(_matches(model, infos) for model in layout.known_unsupported)
        for layout in known.values()
    )


def in_family(name: str, layout: Layout, wanted: str) -> tuple[str, Layout]:
    """The layout `wanted` of the family of `layout`, with its name, which may lack the family's prefix.

    `name` is the name of `layout`: for rwkv6-hf, `wanted` may be "rwkv6-fla" or "fla". Raises
    UnknownNameError if the family has no such layout.
    """
    family = layout.family.name if layout.family else ""
    loaded, failed = LAYOUTS.load_all()
    known = {other: found for other, found in loaded.items() if found.family and found.family.name == family}
    if not known:
        raise UnknownNameError(f"a model of the layout {name} has no other layouts to be converted to")
    full = wanted if wanted in known else f"{family}-{wanted}"
    if full not in known:
        short = [other.removeprefix(f"{family}-") for other in known]
        raise UnknownNameError(
            f"a model of the layout {name} has no layout {wanted!r}; "
            f"{did_you_mean(wanted, short)}{_and_failed(failed)}"
        )
    return full, known[full]


def _refuse_unsupported(layout: Layout, infos: Container[str], directory: str) -> None:
    for model in layout.known_unsupported:
        if _matches(model, infos):
            raise CheckpointError(
                f"{directory} is {model.title} (it has {model.present[0]}): no layout covers it; "
                f"give a model of this kind: {layout.summary}"
            )


def _matches(model: KnownUnsupported, infos: Container[str]) -> bool:
    present = all(name in infos for name in model.present)
    return present and not any(name in infos for name in model.absent)


def _and_failed(failed: Sequence[PluginError]) -> str:
    return "".join(f"; {error}" for error in failed)
